"""GradHandle: what ``p.grad`` is while the gradient's bytes live in a slab or on disk.

A tensor of the gradient's shape, dtype and device without memory of its own. The operations of an
ordinary training loop cost no pass over the bytes: a norm was computed while they were in memory, a
multiplication by a scalar (clipping, unscaling) is kept as a factor and applied by the update,
zeroing is noted. Any other operation works on a real copy, which an in-place operation stores
back; one that returns a view makes the gradient an ordinary tensor until it is next accumulated or
used by an update. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from offload.errors import SpilledTensorError

if TYPE_CHECKING:
    from offload.tiers.unit import OffloadedParam

aten = torch.ops.aten
Scalar = float | torch.Tensor


class GradState:
    """The gradient of one parameter since it was last absent.

    Attributes:
        owner: its parameter.
        zero: the value is zero whatever the slab holds.
        factors: scalars still to be multiplied onto the bytes in the slab, in order.
        norms: of the bytes in the slab (without factors), by order.
        real: the gradient as an ordinary tensor, once somebody has a view of it.
    """

    def __init__(self, owner: OffloadedParam) -> None:
        """A gradient whose bytes the slab of `owner`'s unit holds."""
        self.owner = owner
        self.zero = False
        self.factors: list[Scalar] = []
        self.norms: dict[float, torch.Tensor] = {}
        self.real: torch.Tensor | None = None

    def factor_values(self) -> list[float]:
        """Return the factors as the fp32 values that multiplying an fp32 tensor would use."""
        values = [torch.as_tensor(f, dtype=torch.float32).item() for f in self.factors]
        return [value for value in values if value != 1.0]

    def scale(self, factor: Scalar) -> None:
        """Note a multiplication by `factor`."""
        self._check()
        if self.real is not None:
            self.real.mul_(factor)
        elif not self.zero or not _is_finite(factor):
            self.factors.append(factor.clone() if isinstance(factor, torch.Tensor) else factor)

    def set_zero(self) -> None:
        """Note that the value is zero."""
        self._check()
        if self.real is not None:
            self.real.zero_()
            return
        self.zero = True
        self.factors.clear()
        self.norms.clear()

    def norm(self, order: float) -> torch.Tensor:
        """Return ``torch.linalg.vector_norm(gradient, order)``, a 0-dim tensor."""
        self._check()
        if self.factors or self.zero or self.real is not None:
            norm: torch.Tensor = torch.linalg.vector_norm(self.materialize(), order)
            return norm
        context = self.owner.context
        with context.lock:
            if order not in self.norms:
                context.gradients.norm_orders.add(order)
                value = self._view().to(self.owner.device)
                self.norms[order] = torch.linalg.vector_norm(value, order)
            return self.norms[order].clone()

    def note_norms(self, view: torch.Tensor, orders: set[float]) -> None:
        """Compute the norms of the bytes while they are in memory."""
        if not self.zero and not self.factors:
            self.norms = {order: torch.linalg.vector_norm(view, order) for order in orders}

    def materialize(self) -> torch.Tensor:
        """Return the gradient as an ordinary tensor: a copy, or `real` itself."""
        self._check()
        if self.real is not None:
            return self.real
        if self.zero:
            owner = self.owner
            value = torch.zeros(owner.shape, dtype=owner.dtype, device=owner.device)
        else:
            with self.owner.context.lock:
                value = self._view().to(self.owner.device, copy=True)
        for factor in self.factors:
            value.mul_(factor)
        return value

    def make_real(self) -> None:
        """Make ``p.grad`` an ordinary tensor from now on."""
        if self.real is None:
            self.real = self.materialize()
            self.owner.param.grad = self.real

    def store(self, value: torch.Tensor) -> None:
        """Replace the gradient by `value`."""
        self._check()
        if value is self.real:
            return
        with self.owner.context.lock:
            self.owner.context.gradients.modify(self.owner).copy_(value)
        self.zero = False
        self.factors.clear()
        self.norms.clear()

    def _view(self) -> torch.Tensor:
        return self.owner.context.gradients.read(self.owner)

    def _check(self) -> None:
        if self.real is None and self.owner.grad_state is not self:
            raise SpilledTensorError(
                f"this gradient of {self.owner.name} no longer exists: it was set to None (by "
                "zero_grad) or replaced; take .clone() of a gradient that is to be kept"
            )


class GradHandle(torch.Tensor):
    """The tensor that stands for a GradState; see the module's text."""

    _state: GradState

    @staticmethod
    def __new__(cls, state: GradState) -> GradHandle:
        """Make a handle with the shape, strides and dtype of the gradient."""
        owner = state.owner
        handle: GradHandle = torch.Tensor._make_wrapper_subclass(
            cls,
            owner.shape,
            strides=owner.stride,
            dtype=owner.dtype,
            device=owner.device,
            requires_grad=False,
        )
        handle._state = state
        return handle

    def __init__(self, state: GradState) -> None:
        """All is done by __new__."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe the handle without reading the gradient."""
        owner = self._state.owner
        return f"GradHandle({owner.name}, shape={tuple(owner.shape)}, dtype={owner.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on gradients that may not be in memory."""
        kwargs = kwargs or {}
        shortcut = _SHORTCUTS.get(func)
        if shortcut is not None:
            result = shortcut(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_real_copies(func, args, kwargs)


def _is_finite(factor: Scalar) -> bool:
    return bool(torch.isfinite(torch.as_tensor(factor)))


def _on_real_copies(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run any operator on real copies of the handles, and store back what it mutated."""
    copies: dict[int, tuple[GradHandle, torch.Tensor]] = {}
    returns_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)

    def real(value: Any) -> Any:
        if not isinstance(value, GradHandle):
            return value
        if returns_view:
            value._state.make_real()
        if id(value) not in copies:
            copies[id(value)] = (value, value._state.materialize())
        return copies[id(value)][1]

    result = func(*tree_map(real, args), **tree_map(real, kwargs))
    if func._schema.is_mutable:
        for handle, copy in copies.values():
            handle._state.store(copy)
    handles = {id(copy): handle for handle, copy in copies.values()}
    return tree_map(lambda value: handles.get(id(value), value), result)


def _detach(handle: GradHandle) -> GradHandle:
    return GradHandle(handle._state)


def _vector_norm(
    handle: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if dim is not None or keepdim or dtype is not None:
        return NotImplemented
    return handle._state.norm(float(order))


def _foreach_norm(tensors: Sequence[Any], order: float = 2, dtype: Any = None) -> Any:
    if dtype is not None:
        return NotImplemented
    return [torch.linalg.vector_norm(t, order) for t in tensors]


def _scale(handle: Any, factor: Any) -> Any:
    if not isinstance(handle, GradHandle) or isinstance(factor, GradHandle):
        return NotImplemented
    if isinstance(factor, torch.Tensor) and factor.dim() > 0:
        return NotImplemented
    handle._state.scale(factor)
    return handle


def _foreach_scale(tensors: Sequence[Any], factor: Any) -> Any:
    for tensor in tensors:
        tensor.mul_(factor)


def _zero(handle: GradHandle) -> GradHandle:
    handle._state.set_zero()
    return handle


def _foreach_zero(tensors: Sequence[Any]) -> None:
    for tensor in tensors:
        tensor.zero_()


_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.linalg_vector_norm.default: _vector_norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten.mul_.Tensor: _scale,
    aten.mul_.Scalar: _scale,
    aten._foreach_mul_.Scalar: _foreach_scale,
    aten._foreach_mul_.Tensor: _foreach_scale,
    aten.zero_.default: _zero,
    aten._foreach_zero_.default: _foreach_zero,
}
