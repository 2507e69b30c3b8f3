"""spill(): any torch optimizer with its state in host memory and on disk within a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NoReturn, overload

import torch
from torch.optim import LBFGS, Optimizer, SparseAdam

from offload.errors import UnsupportedError
from offload.optim.separable import check_separable
from offload.optim.spilling import Spilling, refuse_options
from offload.policy import Policy

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


def spill(
    cls: type[Optimizer], params: Params, *, policy: Policy | None = None, **arguments: Any
) -> Optimizer:
    """Return an optimizer of class `cls` whose state does not have to fit into memory.

    Each step goes parameter by parameter: the state of one is brought to memory, the class's own
    ``step()`` runs on it, and it is written back, while that of the next ones is being read. The
    results are the bits of ``cls(params, **arguments)``. Parameters of wrapped models keep their
    state in the model's tiers; for others `policy` says how much memory and which disk.

    What of the state are tensors of at least 64 KiB is in the budget. Not in it: smaller ones, what
    the class itself allocates during a step on one parameter (its new state at the first step), a
    copy of one gradient of a wrapped model that was scaled (clipped, say), and what
    ``state_dict()`` copies, which is everything.

    ``optimizer.state[p]`` is a read-only mapping to copies; to change state, assign a whole mapping
    to it, or use ``load_state_dict``.

    Args:
        cls: any subclass of ``torch.optim.Optimizer`` whose step treats each parameter by itself.
        params: as for `cls`; dense parameters on the CPU.
        policy: for parameters of plain models, and only for these: ``budget``, ``swap_dir`` and the
            I/O options are used. Without a swap directory, state that does not fit is refused.
        arguments: of the constructor of `cls`. ``foreach`` and ``fused`` are passed on,
            ``differentiable=True`` and ``capturable=True`` refused.

    Returns:
        An instance of a subclass of `cls`.

    Raises:
        UnsupportedError: `cls` needs all parameters at once, or sparse gradients, or an option or a
            parameter cannot be supported.
        PolicyError: there are plain parameters and no policy, or only others and a policy.
        BudgetError, SwapIOError: the policy's memory or directory cannot be used.
        TypeError: `cls` is not an optimizer class.
        Exception: what the constructor of `cls` raises.
    """
    if not isinstance(cls, type) or not issubclass(cls, Optimizer) or cls is Optimizer:
        raise TypeError(f"spill() wants a subclass of torch.optim.Optimizer, got {cls!r}")
    if issubclass(cls, SpilledOptimizer) or cls.__module__.startswith("offload."):
        raise UnsupportedError(f"{cls.__name__} spills its state by itself; it needs no spill()")
    if issubclass(cls, SparseAdam):
        raise UnsupportedError("SparseAdam is for sparse gradients, which cannot be spilled")
    if issubclass(cls, LBFGS):
        raise UnsupportedError(
            "LBFGS cannot be spilled: its step needs the history of all parameters at once"
        )
    refuse_options(arguments)
    hashable: Any = cls
    return _spilled_class(hashable)(params, policy, arguments)


class SpilledOptimizer(Optimizer):
    """What spill() adds to an optimizer class; it makes a subclass of both."""

    _spill: Spilling

    def __init__(self, params: Params, policy: Policy | None, arguments: dict[str, Any]) -> None:
        """Run the class's constructor, with state that it makes going where state goes."""
        self._spill = Spilling(_real_class(type(self)), policy)
        weakref.finalize(self, self._spill.close).atexit = False
        with self._spill.building():
            super().__init__(params, **arguments)
        self._spill.check_policy(self.param_groups)
        self._spill.takes_closure = check_separable(self._spill.cls, self.param_groups, arguments)

    @property
    def state(self) -> Any:
        """Parameters' state; see ``StateMap``."""
        return self._spill.state

    @state.setter
    def state(self, value: Any) -> None:
        self._spill.replace(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            UnsupportedError, PolicyError: a parameter or option that spill() refuses; nothing was
                added.
        """
        groups = len(self.param_groups)
        with self._spill.building():
            super().add_param_group(param_group)
            try:
                for group in self.param_groups[groups:]:
                    self._spill.check_group(group)
            except BaseException:
                del self.param_groups[groups:]
                raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; see ``torch.optim.Optimizer.step``.

        After an error (of the disk, say) each parameter and its state are both as before the step
        or both as after it; the error's note says where it stopped.

        Raises:
            UnsupportedError: a sparse gradient, a refused option, or a closure where the class does
                something else before it evaluates it, or again after it; nothing was updated.
            BudgetError, SwapSpaceError: there is no room for the state of a parameter.
            OffloadError: the disk failed.
        """
        loss = None
        if closure is not None:
            self._spill.check_closure()
            with torch.enable_grad():
                loss = closure()
        self._spill.step(self)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state in the format of the real class, which can load it."""
        with self._spill.plain_copies():
            return super().state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what ``load_state_dict`` has prepared."""
        others = dict(state)
        with self._spill.replacing(others.pop("state")):
            super().__setstate__(others)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickle and copy.copy."""
        raise UnsupportedError(
            "a spilled optimizer cannot be copied or pickled: its state is on a disk; save "
            "optimizer.state_dict(), and load it into a new one"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refuse copy.deepcopy."""
        self.__reduce_ex__(2)


@cache
def _spilled_class(cls: Any) -> Callable[..., SpilledOptimizer]:
    about = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    make: Any = type(cls)
    made: Callable[..., SpilledOptimizer]
    made = make(f"Spilled{cls.__name__}", (SpilledOptimizer, cls), about)
    return made


def _real_class(spilled: type[Optimizer]) -> type[Optimizer]:
    real: type[Optimizer] = spilled.__mro__[2]
    return real
