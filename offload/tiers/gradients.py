"""Gradients: how those of a wrapped model come to their slabs and are got at there.

Life of a unit in a backward pass:
 1. begin_backward: its parameters and its gradient slab are held.
 2. accumulate: each gradient is copied, or added, to the slab.
 3. end_unit_backward: as many have come as in the last complete backward, or the whole backward
    ends (end_backward). Consumers take theirs, the others may go to disk, the unit is released.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from offload.errors import OffloadError, SpilledTensorError, UnsupportedError
from offload.tiers.grad_handle import GradHandle, GradState
from offload.tiers.slab import Residency, Slab
from offload.tiers.unit import Consumer, OffloadedParam, Unit
from offload.trace import Phase, Use

if TYPE_CHECKING:
    from offload.tiers.context import RuntimeContext


class Gradients:
    """The gradients of one wrapped model. Every use is to be under the context's lock.

    Attributes:
        in_backward: units whose backward has begun and not ended.
        norm_orders: orders of gradient norms that the training loop has asked for.
        on_backward: called when a backward needs something of the model.
    """

    def __init__(self, context: RuntimeContext) -> None:
        """No backward is running."""
        self._context = context
        self.in_backward: dict[Unit, None] = {}
        self.norm_orders: set[float] = set()
        self.on_backward: Callable[[], None] = lambda: None

    def begin_backward(self, unit: Unit) -> None:
        """A use of `unit` in a backward pass: hold it until its gradients are complete.

        Its parameters are not attached: autograd has the slab's memory from load(). So what a
        recomputation inside the backward does with them is seen by touch().
        """
        self.on_backward()
        if unit.in_backward:
            return
        if unit.grad_slab is None:  # nothing tells when it is done with but the turn of the next
            for other in [u for u in self.in_backward if u.grad_slab is None]:
                self.end_unit_backward(other)
        unit.in_backward = True
        self.in_backward[unit] = None
        self._lock_for_backward(unit, 1)
        self._context.prefetcher.advance(Use(unit.index, Phase.BACKWARD))

    def _lock_for_backward(self, unit: Unit, change: int) -> None:
        unit.param_slab.locks += change
        if unit.grad_slab is not None:
            unit.grad_slab.locks += change

    def accumulate(self, param: OffloadedParam, new: torch.Tensor, state: GradState | None) -> None:
        """Add `new` to the gradient `state` of `param` (None: there is none yet)."""
        unit = param.unit
        if new.layout is not torch.strided:
            raise UnsupportedError(f"{param.name}: sparse gradients cannot be offloaded")
        if new.requires_grad:
            raise UnsupportedError(
                f"backward(create_graph=True) through {param.name}: the gradient of a gradient "
                "cannot be spilled; use torch.autograd.grad for it"
            )
        if state is None and unit.tier is None:
            self.set(param, new)
        elif state is None:
            self._check_trainable(param)
            self._on_device(param).copy_(new)
            param.param.grad = GradHandle(GradState(param))
        else:
            param.param.grad = GradHandle(state)
            self._add(param, new, state)
        unit.arrived.add(param)
        if len(unit.arrived) >= unit.expected:
            self.end_unit_backward(unit)

    def _add(self, param: OffloadedParam, new: torch.Tensor, state: GradState) -> None:
        """Add `new`; no tensor on the gradients outlives this, so that they may be copied."""
        view = self.modify(param) if param.unit.tier is None else self._on_device(param)
        if state.zero:
            view.zero_()
        for factor in state.factors:
            view.mul_(factor)
        view.add_(new)
        state.zero = False
        state.factors.clear()
        state.norms.clear()

    def _on_device(self, param: OffloadedParam) -> torch.Tensor:
        """Return its part of the device's copy of the gradients, to be changed.

        What the slab holds of others is kept.
        """
        slab, device = self.slab(param.unit), param.unit.tier
        if device is None:
            raise OffloadError(f"{slab.name}: there is no device (internal error)")
        copy = device.copy_of(slab)
        if copy is None or not copy.ahead:
            self._context.settle(param.unit)  # an update in flight reads them
            held = slab.residency is not Residency.ABSENT and param.unit.grads_wanted()
            if not held:  # its memory is taken while others may still be made to let go
                self._context.mover.hold_new(slab)
            copy = device.fetch(slab) if held else device.hold_new(slab)
            copy.ahead = True
        return copy.view(param.offset, param.shape, param.stride, param.dtype)

    def come_home(self, unit: Unit, to_disk: bool = True) -> None:
        """Have the gradients of `unit` that are on the device in their slab."""
        if unit.tier is not None and unit.grad_slab is not None:
            unit.tier.send(unit.grad_slab, to_disk)

    def _leave_device(self, unit: Unit) -> None:
        """The consumers had theirs there: what is newer than the slab goes home, or nowhere."""
        if unit.grads_wanted():
            self.come_home(unit, to_disk=False)
        elif unit.tier is not None and unit.grad_slab is not None:
            copy = unit.tier.copy_of(unit.grad_slab)
            if copy is not None and copy.ahead:
                unit.tier.drop(unit.grad_slab)

    def _replace(self, unit: Unit) -> None:
        """The bytes in the slab are about to be changed: the device's copy is not current."""
        if unit.tier is not None and unit.grad_slab is not None:
            unit.tier.drop(unit.grad_slab)

    def set(self, param: OffloadedParam, value: torch.Tensor) -> None:
        """Make `value` the gradient of `param`."""
        self._check_trainable(param)
        unit, slab = param.unit, self.slab(param.unit)
        self.come_home(unit)
        self._context.settle(unit)
        self._replace(unit)
        if slab.residency is not Residency.ABSENT and unit.grads_wanted():
            self._context.mover.fetch(slab)
            self._context.mover.settle(slab)
            self._context.mover.mark_dirty(slab)
        else:
            self._context.mover.hold_new(slab)
        param.view(slab).copy_(value)
        param.param.grad = GradHandle(GradState(param))

    @staticmethod
    def _check_trainable(param: OffloadedParam) -> None:
        if not param.trainable:
            raise UnsupportedError(
                f"{param.name} has a gradient but did not require one when the model was wrapped; "
                "offload.unwrap() and wrap the model again"
            )

    def slab(self, unit: Unit) -> Slab:
        """Return the slab of the unit's gradients; it has some."""
        if unit.grad_slab is None:
            raise OffloadError(f"{unit.name} has no gradient slab (internal error)")
        return unit.grad_slab

    def end_unit_backward(self, unit: Unit, complete: bool = True) -> None:
        """All gradients that this backward has for `unit` are in its slab, if `complete`."""
        if unit.arrived:
            taken = {param for param in unit.arrived if param.consumer is not None}
            unit.unconsumed |= taken
            if not complete or len(taken) < len(unit.arrived):
                self._store_grads(unit)
            if unit.index not in self._context.device_units:
                self.come_home(unit, to_disk=False)
            unit.expected = len(unit.arrived)
            unit.arrived = set()
        if complete:
            self._hand_over_grads(unit)  # while the unit is still held
            self._leave_device(unit)
        if unit.in_backward:
            unit.in_backward = False
            self.in_backward.pop(unit, None)
            self._lock_for_backward(unit, -1)
        self._context.rest(unit)

    def _hand_over_grads(self, unit: Unit) -> None:
        """Let the consumers of the gradients that have come take them."""
        fresh: dict[Consumer, list[OffloadedParam]] = {}
        for param in unit.params:
            if param in unit.unconsumed and param.consumer is not None:
                fresh.setdefault(param.consumer, []).append(param)
        unit.unconsumed = set()
        for consume, params in fresh.items():
            consume(params)

    def _store_grads(self, unit: Unit) -> None:
        """Send the gradients that have arrived on their way to disk."""
        slab, device = self.slab(unit), unit.tier
        if slab.pinned and device is None:
            return
        for param in unit.arrived:
            state = param.grad_state
            if state is not None:
                state.note_norms(
                    param.view(slab) if device is None else self._on_device(param),
                    self.norm_orders,
                )
        if device is None:
            self._context.mover.write_back(slab)
        else:
            device.send(slab)

    def read(self, param: OffloadedParam) -> torch.Tensor:
        """Return the bytes of a gradient in the slab, to be read at once."""
        slab = self.slab(param.unit)
        self.come_home(param.unit)
        if slab.residency is Residency.ABSENT:
            raise SpilledTensorError(f"the gradient of {param.name} no longer exists")
        self._context.mover.fetch(slab)
        return param.view(slab)

    def modify(self, param: OffloadedParam) -> torch.Tensor:
        """Return the bytes of a gradient in the slab, to be changed at once."""
        slab = self.slab(param.unit)
        self._context.settle(param.unit)  # an update in flight reads them
        view = self.read(param)
        self._context.mover.settle(slab)
        self._replace(param.unit)
        self._context.mover.mark_dirty(slab)
        return view

    def end_unit_backward_partially(self, unit: Unit) -> None:
        """End a backward in which not all gradients came; how many will come is not learnt."""
        expected = unit.expected
        self.end_unit_backward(unit, complete=False)
        unit.expected = expected

    def end_backward(self) -> None:
        """A whole backward pass is over."""
        for unit in self._context.units:
            if unit.in_backward or unit.arrived or unit.unconsumed:
                self.end_unit_backward(unit)
