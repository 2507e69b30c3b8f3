"""Parameters of wrapped models during a step: their units in memory, their gradients tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from offload.errors import OffloadError
from offload.tiers.grad_handle import GradHandle
from offload.tiers.unit import OffloadedParam, Unit


class AttachedUnit:
    """Holds the unit of the parameter that is stepped; a context manager.

    Consecutive parameters of one unit are stepped without letting go of it.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._unit: Unit | None = None
        self._held: AbstractContextManager[None] | None = None

    def __enter__(self) -> AttachedUnit:
        """Hold nothing yet."""
        return self

    def __exit__(self, *exc: Any) -> None:
        """Let go of the last unit."""
        self.use(None)

    def use(self, owner: OffloadedParam | None) -> None:
        """Have the unit of `owner` attached and let go of another one; None: only let go."""
        unit = owner.unit if owner is not None else None
        if unit is self._unit:
            return
        held, self._unit, self._held = self._held, None, None
        if held is not None:
            held.__exit__(None, None, None)
        if owner is not None:
            held = owner.context.held(owner.unit)
            held.__enter__()
            self._unit, self._held = owner.unit, held


@contextmanager
def gradient_as_tensor(param: torch.Tensor, owner: OffloadedParam | None) -> Iterator[None]:
    """Let ``param.grad`` be an ordinary tensor within a block; changes to it are kept.

    It is the gradient slab's memory. With a deferred factor (of clipping, say), it is a copy.
    """
    handle = param.grad
    if owner is None or not isinstance(handle, GradHandle):
        yield
        return
    context, state, slab = owner.context, handle._state, owner.unit.grad_slab
    if slab is not None:
        slab.locks += 1
    try:
        is_copy = state.zero or bool(state.factors)
        real = state.materialize() if is_copy else context.gradients.read(owner)
        version = real._version
        param.grad = real
        try:
            yield
        finally:
            if param.grad is real:
                param.grad = handle
                if real._version != version:
                    _keep_changes(handle, real, is_copy)
    finally:
        if slab is not None:
            slab.locks -= 1


@contextmanager
def gradient_and_factors(
    param: torch.Tensor, owner: OffloadedParam | None
) -> Iterator[tuple[torch.Tensor, list[float]]]:
    """Give the gradient as an ordinary tensor, and factors still to be multiplied onto it in order.

    The tensor is not to be changed, nor used after the block: it may be the gradient slab's memory.
    """
    handle = param.grad
    if handle is None:
        raise OffloadError("there is no gradient (internal error)")
    if owner is None or not isinstance(handle, GradHandle):
        yield handle, []
        return
    state, slab = handle._state, owner.unit.grad_slab
    if state.zero:
        yield state.materialize(), []
        return
    if slab is not None:
        slab.locks += 1
    try:
        yield owner.context.gradients.read(owner), state.factor_values()
    finally:
        if slab is not None:
            slab.locks -= 1


def multiplied(grad: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """Return `grad` multiplied by each of `factors`: itself, or a copy where there are any."""
    if not factors:
        return grad
    grad = grad.clone()
    for factor in factors:
        grad.mul_(factor)
    return grad


def _keep_changes(handle: GradHandle, real: torch.Tensor, is_copy: bool) -> None:
    state = handle._state
    if is_copy:
        state.store(real)
    else:
        state.owner.context.gradients.modify(state.owner)
        state.norms.clear()
