"""Updates of parameters of wrapped models: their units are handed to the update pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload import _native
from offload.errors import OffloadError
from offload.optim.param_state import ParamState, UnitState
from offload.optim.update import Update
from offload.tiers.context import RuntimeContext
from offload.tiers.grad_handle import GradHandle, GradState
from offload.tiers.state_layout import StateLayout
from offload.tiers.unit import OffloadedParam, Unit

Jobs = dict[Unit, dict[StateLayout, list[_native.UpdateSegment]]]


def update_units(updates: Sequence[Update], seed: int, at_once: bool = False) -> None:
    """Begin one step for each of `updates`, in the order in which the units are needed next.

    With a lazy policy the steps are done in the background, else when this returns. `at_once`
    starts them now whatever is needed next: their gradients are in memory.

    Raises:
        OffloadError: an update failed.
    """
    contexts: dict[RuntimeContext, Jobs] = {}
    for update in updates:
        kept = _unit_state(update.kept)
        owner = kept.owner
        if owner.numel:
            jobs = contexts.setdefault(kept.context, {}).setdefault(owner.unit, {})
            jobs.setdefault(update.layout, []).append(_segment(owner, update))
    for context, units in contexts.items():
        with context.lock:
            for unit in context.prefetcher.in_order_of_use(list(units)):
                # Parameters whose groups' options differ in what they keep take turns.
                for layout, segments in units[unit].items():
                    segments.sort(key=lambda segment: segment.begin)
                    context.begin_update(unit, layout, seed, segments)
            if at_once:
                for unit in units:
                    context.updates.start(unit)
            if not at_once or not context.policy.lazy_step:
                context.end_step()


def _segment(owner: OffloadedParam, update: Update) -> _native.UpdateSegment:
    grad = _gradient(owner, update.grad)
    end = owner.first + owner.numel
    factors = [*grad.factor_values(), *update.factors]
    return _native.UpdateSegment(owner.first, end, update.hyper, factors, update.kept.number)


def _gradient(owner: OffloadedParam, grad: torch.Tensor) -> GradState:
    """Have the gradient of `owner` in the unit's slab."""
    if not isinstance(grad, GradHandle):  # the user assigned a tensor of their own
        owner.context.gradients.set(owner, grad)
    state = owner.grad_state
    if state is None:
        raise OffloadError(f"the gradient of {owner.name} was not taken over (internal error)")
    if state.zero:
        state.store(state.materialize())
    return state


def _unit_state(kept: ParamState) -> UnitState:
    if not isinstance(kept, UnitState):
        raise OffloadError("the state is not that of a unit (internal error)")
    return kept
