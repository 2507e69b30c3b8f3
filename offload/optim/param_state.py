"""ParamState: the arrays that an optimizer keeps for one parameter, wherever they live.

Arrays are flat here, in the order in which the elements of the parameter lie in memory (a parameter
whose elements do not lie side by side has its state as if it were contiguous).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from offload import _native
from offload.optim.huge_pages import collapse
from offload.tiers.changed_values import sync_masters
from offload.tiers.context import RuntimeContext
from offload.tiers.state_home import StateHome, page_bytes
from offload.tiers.state_layout import MASTER, StateArray, StateLayout
from offload.tiers.state_slabs import StateSlabs, Tenant
from offload.tiers.unit import OffloadedParam

if TYPE_CHECKING:
    from offload.optim.update import Operands


class ParamState(ABC):
    """The state of one parameter.

    Attributes:
        param: the parameter.
        number: its place in the optimizer, counted over the groups.
        layout: for which everything is ready; None: look again before the next update.
        fresh: states were begun, and nothing was updated since.
        owner: what a wrapped model knows of the parameter; None: it is ordinary memory.
        operands: of the last update, where the parameter is in ordinary memory.
    """

    owner: OffloadedParam | None = None
    operands: Operands | None = None
    _step: torch.Tensor | None = None
    _count: Any = None  # the memory of `_step` as numpy sees it

    def __init__(self, param: torch.Tensor, number: int) -> None:
        """State that was not begun."""
        self.param = param
        self.number = number
        self.layout: StateLayout | None = None
        self.fresh = False

    def count(self, step: torch.Tensor) -> float:
        """Add 1 to `step`, a tensor in ``optimizer.state``, and return it.

        By numpy: torch takes microseconds for each such operation.
        """
        if step is not self._step:
            self._step, self._count = step, step.detach().reshape(()).numpy()
        self._count[()] += 1
        return float(self._count)

    def is_stale(self, states: MutableMapping[Any, Any]) -> bool:
        """Whether the optimizer's ``state``, which is `states`, is not that of this object."""
        return False

    def restart(self) -> None:
        """Forget what was begun: another state is loaded."""
        self.layout = None
        self.fresh = False

    @abstractmethod
    def has(self, array: StateArray) -> bool:
        """Whether `array` was begun."""

    @abstractmethod
    def begin(self, array: StateArray, values: torch.Tensor | None) -> None:
        """Have `array` hold `values`, flat; None: zero."""

    def begin_master(self, array: StateArray) -> None:
        """Have `array`, the fp32 copy of a 16-bit parameter, hold the parameter."""
        self.begin(array, self.values())  # copying them widens them

    @abstractmethod
    def read(self, array: StateArray) -> torch.Tensor:
        """Return what `array`, which was begun, holds: flat, a copy or an alias."""

    def tensor(self, array: StateArray) -> torch.Tensor:
        """Return what `array`, which was begun, holds, in the parameter's shape."""
        return self.shaped(self.read(array))

    @abstractmethod
    def values(self) -> torch.Tensor:
        """Return the parameter's own elements, flat: a copy or an alias."""

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """Return `flat`, one element per element of the parameter, in the parameter's shape."""
        return flat.as_strided(self.param.shape, self.stride())

    @abstractmethod
    def stride(self) -> tuple[int, ...]:
        """Return the strides with which the flat arrays become tensors of the parameter's shape."""

    def flat(self, value: torch.Tensor) -> torch.Tensor:
        """Return the elements of `value`, which has the parameter's shape, flat."""
        dense = torch.empty_strided(self.param.shape, self.stride(), dtype=value.dtype)
        return dense.copy_(value).as_strided((value.numel(),), (1,))


class Bound:
    """Tensors of ``optimizer.state`` that are as the native core needs them, and their addresses.

    Attributes:
        tensors: by name; what is bound stays alive.
        master, states, scales: addresses; 0 where there is no master copy.
    """

    __slots__ = ("master", "scales", "states", "tensors")

    def __init__(self, layout: StateLayout, state: Mapping[str, torch.Tensor]) -> None:
        """Bind what `layout` names."""
        self.tensors = {array.name: state[array.name] for array in layout.arrays}
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self.master = 0 if layout.master is None else pointers[layout.master.name]
        self.states = [pointers[array.name] for array in layout.states]
        self.scales = [pointers[array.name] for array in layout.scales]


class MemoryState(ParamState):
    """State in ordinary tensors: the ones in ``optimizer.state``."""

    def __init__(
        self,
        param: torch.Tensor,
        number: int,
        states: MutableMapping[Any, dict[str, Any]],
        owner: OffloadedParam | None = None,
    ) -> None:
        """Let the arrays be the tensors in the parameter's part of `states`, by name.

        With an `owner`, it is a frozen parameter of a wrapped model: state may be loaded for it,
        and it is never updated.
        """
        super().__init__(param, number)
        self.owner = owner
        self._states = states
        self._stride = _dense_stride(param) if owner is None else owner.stride
        self.bound: Bound | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The parameter's part of ``optimizer.state``; empty where there is none yet."""
        return self._states.get(self.param, {})

    def is_stale(self, states: MutableMapping[Any, Any]) -> bool:
        """Whether ``optimizer.state`` was replaced."""
        return self._states is not states

    def bind(self, layout: StateLayout) -> None:
        """Make sure that what `layout` needs, which was begun, is as the native core needs it.

        Whoever has put a tensor of their own into ``optimizer.state`` is served with a copy.

        Raises:
            ValueError: it has another shape than the parameter.
        """
        for array in layout.arrays:
            tensor = self.state[array.name]
            expected = (array.numel(self.param.numel()),) if array.per > 1 else self.param.shape
            if tensor.shape != expected:
                raise ValueError(
                    f"{array.name} of parameter {self.number} has the shape {tuple(tensor.shape)}, "
                    f"the parameter {tuple(self.param.shape)}"
                )
            stride = (1,) if array.per > 1 else self._stride
            if tensor.dtype is not array.dtype or tensor.stride() != stride:
                self.begin(array, (tensor if array.per > 1 else self.flat(tensor)).to(array.dtype))
        if self.bound is None and self.owner is None:
            collapse(self.param.detach())
        self.bound = Bound(layout, self.state)

    def is_bound(self) -> bool:
        """Whether what was bound is still what ``optimizer.state`` holds."""
        if self.bound is None:
            return False
        state = self.state
        return all(state.get(name) is tensor for name, tensor in self.bound.tensors.items())

    def has(self, array: StateArray) -> bool:
        """Whether there is such a tensor."""
        return self.state.get(array.name) is not None

    def begin(self, array: StateArray, values: torch.Tensor | None) -> None:
        """Put a tensor into ``optimizer.state``: of the parameter's shape, scales flat."""
        memory = zeros(array.numel(self.param.numel()), array.dtype)
        if values is not None:
            memory.copy_(values)
        self._states.setdefault(self.param, {})[array.name] = (
            memory if array.per > 1 else self.shaped(memory)
        )

    def read(self, array: StateArray) -> torch.Tensor:
        """Return the tensor's elements."""
        tensor: torch.Tensor = self.state[array.name]
        return tensor if array.per > 1 else self.flat(tensor)

    def tensor(self, array: StateArray) -> torch.Tensor:
        """Return the tensor itself."""
        tensor: torch.Tensor = self.state[array.name]
        return tensor

    def values(self) -> torch.Tensor:
        """Return an alias where the elements lie side by side, else a copy."""
        return self.flat(self.param.detach()) if self.owner else _elements(self)

    def stride(self) -> tuple[int, ...]:
        """Return those of a dense tensor like the parameter."""
        return self._stride


class SlabState(ParamState):
    """State in slabs of a home of its own, for a parameter in ordinary memory."""

    def __init__(self, param: torch.Tensor, number: int, home: StateHome) -> None:
        """Have no slabs yet; provide() makes them."""
        super().__init__(param, number)
        name = f"parameter {number}"
        self.run = StateSlabs(name, max(1, param.numel()), home)  # there are no empty slabs
        self.tenant = self.run.occupy(name, 0, param.numel())
        self._stride = _dense_stride(param)

    def restart(self) -> None:
        """Forget what was begun."""
        super().restart()
        self.tenant = self.run.occupy(self.tenant.name, 0, self.param.numel())

    def has(self, array: StateArray) -> bool:
        """Whether it was begun."""
        return array in self.tenant.begun

    def begin(self, array: StateArray, values: torch.Tensor | None) -> None:
        """Fill the slab; it must have been provided."""
        with self.run.home.lock:
            self.run.begin(self.tenant, array, values)

    def begin_master(self, array: StateArray) -> None:
        """Fill the slab, or leave it to the first update where it is on disk and was never used."""
        with self.run.home.lock:
            self.run.begin_master(self.tenant, array, self.values())

    def read(self, array: StateArray) -> torch.Tensor:
        """Return a copy."""
        with self.run.home.lock:
            if array.name == MASTER and self.run.is_unwritten(array):
                return self.values().float()
            return self.run.read(self.tenant, array)

    def values(self) -> torch.Tensor:
        """Return an alias where the elements lie side by side, else a copy."""
        return _elements(self)

    def stride(self) -> tuple[int, ...]:
        """Return those of a dense tensor like the parameter."""
        return self._stride


class UnitState(ParamState):
    """State in the slabs of a wrapped model's unit."""

    def __init__(self, owner: OffloadedParam, number: int) -> None:
        """Become the tenant of the parameter's part of the unit's slabs."""
        super().__init__(owner.param, number)
        self.owner: OffloadedParam = owner
        with self.context.lock:
            self.run = self.context.state_of(owner.unit)
            self.tenant = self.run.occupy(owner.name, owner.first, owner.numel)

    @property
    def context(self) -> RuntimeContext:
        """Of the wrapped model."""
        return self.owner.context

    @property
    def planned_in_memory(self) -> bool:
        """Whether the plan keeps the unit's state in memory."""
        return self.context.plan.placements[self.owner.unit.index].pin_state

    def restart(self) -> None:
        """Forget what was begun, and take the parameter over from whoever has its state."""
        super().restart()
        owner = self.owner
        with self.context.lock:
            self.context.settle(owner.unit)
            self.tenant = self.run.occupy(owner.name, owner.first, owner.numel)

    @contextmanager
    def _settled(self) -> Iterator[Tenant]:
        with self.context.lock:
            self.context.settle(self.owner.unit)
            self.run.check(self.tenant)
            yield self.tenant

    def has(self, array: StateArray) -> bool:
        """Whether it was begun."""
        return array in self.tenant.begun

    def begin(self, array: StateArray, values: torch.Tensor | None) -> None:
        """Fill the parameter's part of the slab; it must have been provided.

        A master that does not round to the parameter is not kept, where the model has its own.
        """
        with self._settled() as tenant:
            self.run.begin(tenant, array, values)
            if self.owner.is_narrowed and array.name == MASTER:
                self.owner.unit.written = True

    def begin_master(self, array: StateArray) -> None:
        """Take over the model's master, or fill the parameter's part of the slab."""
        owner = self.owner
        if owner.is_narrowed:
            with self._settled() as tenant:
                self.run.adopt(tenant, array)
            return
        with self._settled() as tenant, self.context.held(owner.unit):
            self.context.load(owner.unit)
            view = owner.view(owner.unit.param_slab)
            self.run.begin(tenant, array, view.as_strided((view.numel(),), (1,)))

    def read(self, array: StateArray) -> torch.Tensor:
        """Return a copy."""
        with self._settled() as tenant:
            if array.name == MASTER:
                sync_masters(self.context, self.owner.unit)
            return self.run.read(tenant, array)

    def values(self) -> torch.Tensor:
        """Return a copy."""
        with self.context.lock, self.context.held(self.owner.unit):
            self.context.load(self.owner.unit)
            view = self.owner.view(self.owner.unit.param_slab)
            return view.as_strided((view.numel(),), (1,)).clone()

    def stride(self) -> tuple[int, ...]:
        """Return the parameter's, which are dense in a unit."""
        return self.owner.stride


class ResidentState(UnitState):
    """State in the slabs of a unit that never leaves memory: it is updated in place."""

    bound: Bound | None = None

    def bind(self, layout: StateLayout) -> None:
        """Have the memory of what `layout` names, which was begun, as the native core needs it."""
        self.bound = Bound(layout, {a.name: self.run.alias(self.tenant, a) for a in layout.arrays})


def _elements(kept: MemoryState | SlabState) -> torch.Tensor:
    """Return the elements of a parameter in ordinary memory, flat: an alias if that is possible."""
    value = kept.param.detach()
    if value.stride() == kept.stride():
        return value.as_strided((value.numel(),), (1,))
    return kept.flat(value)


def _dense_stride(param: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a dense tensor like `param`."""
    stride: tuple[int, ...] = torch.empty_like(param, device="meta").stride()
    return stride


_ON_HUGE_PAGES = 4 << 20


def zeros(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros; large ones on huge pages, where the system has them."""
    nbytes = numel * dtype.itemsize
    if nbytes < _ON_HUGE_PAGES:
        return torch.zeros(numel, dtype=dtype)
    lease = _native.HostArena(page_bytes(nbytes)).allocate(nbytes)
    return torch.frombuffer(lease, dtype=dtype, count=numel).zero_()
