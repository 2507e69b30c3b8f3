"""Unit: parameters that are fetched and released together; OffloadedParam: one of them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from offload.errors import SpilledTensorError
from offload.tiers.compute_device import CPU
from offload.tiers.grad_handle import GradHandle, GradState
from offload.tiers.slab import Slab
from offload.tiers.spent_grad import SpentGrad
from offload.tiers.state_layout import QUANT_BLOCK
from offload.tiers.uncompiled import uncompiled_later

if TYPE_CHECKING:
    from offload import _native
    from offload.tiers.context import RuntimeContext
    from offload.tiers.device_tier import DeviceTier
    from offload.tiers.scopes import RowUse
    from offload.tiers.state_slabs import StateSlabs


class SpilledParameter(torch.nn.Parameter):
    """The class of a parameter while its bytes are not in memory.

    Any torch function on it is handed to its context, which fetches the bytes for the call or
    raises. The parameter is the same object all the time: only its class and ``.data`` change.
    """

    @classmethod
    @uncompiled_later
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` with the spilled parameters among its arguments brought to memory."""
        from offload.tiers.touch import touch

        return touch(func, args, kwargs or {})


class RowsParameter(SpilledParameter):
    """The class of a parameter while only some of its rows are in memory (rows.py)."""


class SpreadParameter(SpilledParameter):
    """The class of a parameter in memory whose module's forward goes from device to device.

    Torch functions come to touch(), which brings it to where the other tensors are.
    """


Consumer = Callable[[Sequence["OffloadedParam"]], None]
"""Applies gradients that are in their unit's slab, and replaces them by SpentGrad."""

Rows = frozenset[int] | None
"""Rows of a unit's parameters; None: all."""

_CONSUMER = "_offload_consumer"


def set_consumer(param: torch.Tensor, consumer: Consumer) -> None:
    """Have the gradients of `param` taken by `consumer` when its unit's are complete.

    It may belong to a wrapped model, or come to belong to one later.
    """
    setattr(param, _CONSUMER, consumer)


OWNER = "_offload_owner"
"""The attribute of a parameter that a wrapped model has."""


def owner_of(param: torch.Tensor) -> OffloadedParam | None:
    """Return what a wrapped model knows of `param`; None when it belongs to no wrapped model.

    Raises:
        SpilledTensorError: the model no longer exists, and the parameter's bytes with it.
    """
    reference: weakref.ref[OffloadedParam] | None = getattr(param, OWNER, None)
    if reference is None:
        return None
    owner = reference()
    if owner is None:
        raise SpilledTensorError(
            "the wrapped model that this parameter belongs to was dropped; keep a reference to "
            "the model, or offload.unwrap() it"
        )
    return owner


class OffloadedParam:
    """Identity of one parameter: its object, its layout, its place in the unit's slabs.

    Attributes:
        name: its qualified name in the model.
        shape, stride, dtype: of the parameter; a stride that is not dense became contiguous.
        given_dtype, given_device: of the model's parameter before it was wrapped and after it was
            unwrapped.
        device: where it is used.
        offset: bytes from the start of the parameter slab, and of the gradient slab if trainable.
        trainable: whether it required a gradient when the model was wrapped.
        rows: along its first dimension, which can be fetched one by one; 0: only whole.
    """

    context: RuntimeContext  # set when the model is taken over

    def __init__(
        self,
        param: torch.nn.Parameter,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
        by_row: bool = False,
    ) -> None:
        """Describe `param` as it is now.

        Args:
            param: of the model.
            name: its qualified name.
            dtype: that it will have; None: the one it has.
            device: where it will be used.
            by_row: only some of its rows may be needed.
        """
        self.param = param
        self.name = name
        self.unit: Unit
        self.shape = tuple(param.shape)
        self.numel = param.numel()
        self.given_dtype, self.given_device = param.dtype, param.device
        self.device = device
        self.dtype = dtype or param.dtype
        self.stride = tuple(param.stride() if _is_dense(param) else _contiguous_stride(param.shape))
        self.nbytes = param.numel() * self.dtype.itemsize
        self.offset = 0
        self.trainable = param.requires_grad
        in_rows = by_row and self.numel and self.stride[0] * self.shape[0] == self.numel
        self.rows = self.shape[0] if in_rows else 0
        self.placeholder = _scalar(self.dtype, device).expand(self.shape)
        self.accumulate_grad: Any = None  # keeps the node, and with it our hook, alive

    def take_over(self) -> None:
        """Make owner_of(param) find this object.

        A weak reference: this object keeps an autograd node, which keeps the parameter, where the
        garbage collector cannot see it.
        """
        setattr(self.param, OWNER, weakref.ref(self))

    def let_go(self) -> None:
        """Undo take_over()."""
        self.accumulate_grad = None
        delattr(self.param, OWNER)

    def view(self, slab: Slab) -> torch.Tensor:
        """Return this parameter's part of one of its unit's slabs."""
        return slab.view(self.offset, self.shape, self.stride, self.dtype)

    def address(self, start: int) -> int:
        """Return where its part of a slab begins that is at `start`; of nothing, 0."""
        return start + self.offset if self.numel else 0

    def ranges(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Return which bytes [begin, end) of the slab `rows` are; all, where it has none."""
        if not self.rows:
            return [(self.offset, self.offset + self.nbytes)] if self.nbytes else []
        size = self.nbytes // self.rows
        return [(self.offset + row * size, self.offset + (row + 1) * size) for row in rows]

    @property
    def is_narrowed(self) -> bool:
        """Whether it is a master, kept in fp32, rounded to 16 bits; see masters.py."""
        return self.dtype is not self.given_dtype

    @property
    def first(self) -> int:
        """Its first element in the unit's slabs."""
        return self.offset // self.dtype.itemsize

    @property
    def consumer(self) -> Consumer | None:
        """Who takes its gradients instead of having them stored."""
        found: Consumer | None = getattr(self.param, _CONSUMER, None)
        return found

    @property
    def grad_state(self) -> GradState | None:
        """The gradient in the slab, None when there is none."""
        grad = self.param.grad
        return grad._state if isinstance(grad, GradHandle) else None


class Unit:
    """Parameters that move together, their slabs, and who uses them at the moment.

    Attributes:
        forward_locks: modules in forward that use it.
        holders: blocks outside of the recorded uses that work on its parameters.
        in_backward: its backward has begun and not all of its gradients have arrived.
        attached: its parameters' ``.data`` are the slab's memory.
        tier: of the device where it is used; None: in host memory.
        spread: there are several devices, and its module's forward goes from one to another.
        state: its optimizer state; None before the first update, or the masters.
        frozen_masters: the masters of its narrowed parameters, if it is frozen.
        update: the optimizer update in flight, if any.
        update_waits: an update was put off and has not started.
        update_slabs: what the pending update uses, the parameters first.
        version: counts changes of its values.
        written: the user changed its values, and fp32 copies of them were not looked at since.
        arrived: parameters whose gradient of this backward is in the slab.
        unconsumed: parameters whose gradient their consumer is still to take.
        expected: how many arrived in the last complete backward.
        seen_version: sum of the parameters' own version counters when they were attached.
        by_row: some of its parameters may be fetched row by row.
        routed: which rows the latest forward named; None: all.
        saved_rows: what the latest forward used that named some, if autograd saved anything of it.
    """

    def __init__(self, index: int, name: str, params: list[OffloadedParam]) -> None:
        """Lay `params` out in slabs: the trainable ones first, so that gradients are a prefix.

        They are of one dtype, and were before. Each starts at a multiple of the elements that share
        a scale in int8 state, so that a block of them is of one parameter; any vector is aligned
        there.
        """
        self.index = index
        self.name = name
        self.params = sorted(params, key=lambda p: not p.trainable)
        offset = trained = 0
        for param in self.params:
            param.unit = self
            param.offset = offset
            block = QUANT_BLOCK * param.dtype.itemsize
            offset += max(1, -(-param.nbytes // block)) * block  # an empty one has a place too
            trained = offset if param.trainable else trained
        self.param_bytes = offset
        self.grad_bytes = trained
        self.param_slab: Slab
        self.grad_slab: Slab | None = None
        self.state: StateSlabs | None = None
        self.frozen_masters: dict[OffloadedParam, Slab] = {}
        self.forward_locks = 0
        self.holders = 0
        self.in_backward = False
        self.attached = False
        self.tier: DeviceTier | None = None
        self.spread = False
        self.update: _native.Transfer | None = None
        self.update_waits = False
        self.update_slabs: list[Slab] = []
        self.version = 0
        self.written = False
        self.arrived: set[OffloadedParam] = set()
        self.unconsumed: set[OffloadedParam] = set()
        self.expected = sum(p.trainable for p in self.params)
        self.seen_version = 0
        self.by_row = any(p.rows for p in self.params)
        self.routed: Rows = frozenset()
        self.saved_rows: RowUse | None = None

    @property
    def trainable(self) -> list[OffloadedParam]:
        """The parameters that have gradients."""
        return [p for p in self.params if p.trainable]

    @property
    def is_narrowed(self) -> bool:
        """Whether its parameters are masters rounded to 16 bits."""
        return self.params[0].is_narrowed

    def ranges(self, rows: Rows) -> list[tuple[int, int]] | None:
        """Return which bytes of the parameter slab a use of `rows` needs; None: all."""
        if rows is None:
            return None
        return [span for param in self.params for span in param.ranges(rows)]

    @property
    def updating(self) -> bool:
        """Whether an optimizer update is pending: put off or in flight."""
        return self.update_waits or self.update is not None

    def grads_wanted(self) -> bool:
        """Whether a gradient in the slab stands behind a ``p.grad``, or an update will read it."""
        grads = [param.param.grad for param in self.trainable]
        return self.update_waits or any(
            grad is not None and not isinstance(grad, SpentGrad) for grad in grads
        )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the strides of `tensor` are a permutation of contiguous ones."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda x: x[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def _scalar(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN, where the type has one: what code that bypasses torch functions would compute with."""
    value = math.nan if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device)
