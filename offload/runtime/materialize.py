"""Materialized: a module whose parameters are real tensors for the length of a block.

Protocol for a module of a wrapped model:
 1. enter: pending updates of its units are finished, their parameters fetched and held. Nothing
    takes them away before the block ends: not a forward, a backward, a step or an interruption.
 2. the block reads and writes the parameters as ordinary tensors, by ``.data`` too. A step within
    it is run before it returns.
 3. exit, also after an exception: what was written becomes the parameters' values in every tier,
    and fp32 copies that an optimizer keeps follow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, Generic, TypeVar

from torch import nn

from offload.errors import BudgetError, UnsupportedError
from offload.runtime.deferred import to_memory
from offload.tiers.changed_values import has_masters, refresh_masters
from offload.tiers.context import RuntimeContext
from offload.tiers.state_home import page_bytes
from offload.tiers.unit import Unit, owner_of

M = TypeVar("M", bound=nn.Module)


class Materialized(AbstractContextManager[M], Generic[M]):
    """See offload.materialize. May be entered several times, also within itself."""

    def __init__(self, module: M) -> None:
        """Bring what is deferred to ordinary memory; find the units of what is wrapped.

        Raises:
            BudgetError: the units do not fit together into what the budget has for spilled ones.
        """
        self._module = module
        to_memory(chain(module.parameters(), module.buffers()))
        owners = [owner_of(param) for param in module.parameters()]
        units = dict.fromkeys(owner.unit for owner in owners if owner is not None)
        self._held = UnitsHeld(f"this {type(module).__name__}", list(units)) if units else None
        if self._held is not None:
            self._held.check_room()

    def __enter__(self) -> M:
        """Return the module, its parameters in memory."""
        if self._held is not None:
            self._held.__enter__()
        return self._module

    def __exit__(self, *exc: Any) -> None:
        """Keep what was written, and let the parameters go."""
        if self._held is not None:
            self._held.__exit__(*exc)


class UnitsHeld(AbstractContextManager[None]):
    """Units of one wrapped model held in memory; what is written to them meanwhile is kept."""

    def __init__(self, what: str, units: list[Unit]) -> None:
        """Hold nothing yet; `what` is what they are the units of, for messages."""
        self._what = what
        self._units = units
        self._context: RuntimeContext = units[0].params[0].context
        self._saved: list[AbstractContextManager[None]] = []

    def check_room(self) -> None:
        """Raise BudgetError when they can never be in memory together."""
        context, plan = self._context, self._context.plan
        spilled = [unit for unit in self._units if not unit.param_slab.pinned]
        needed = sum(page_bytes(unit.param_bytes) for unit in spilled)
        needed += max((2 * unit.grad_bytes for unit in self._units if has_masters(unit)), default=0)
        for tier in context.tiers:
            there = [unit.param_slab for unit in self._units if unit.tier is tier]
            tier.check_room(there, self._what)
        if spilled and needed > plan.ring_bytes:
            raise BudgetError(
                f"{self._what} cannot be in memory as a whole: its spilled parameters need "
                f"{needed} bytes, and of Budget(host={plan.budget_bytes}) {plan.ring_bytes} are "
                "for what comes and goes; materialize() one of its modules at a time, or raise "
                "the budget"
            )

    def __enter__(self) -> None:
        """Have all of them in memory, or none."""
        context, held = self._context, []
        with context.lock:
            try:
                for unit in self._units:
                    context.hold(unit)
                    held.append(unit)
            except BaseException:
                for unit in held:
                    context.let_go(unit)
                raise
        saved = context.saved_hooks()
        saved.__enter__()
        self._saved.append(saved)

    def __exit__(self, *exc: Any) -> None:
        """Take note of what was written, and let them go."""
        self._saved.pop().__exit__(None, None, None)
        context = self._context
        with context.lock:
            replaced = [name for unit in self._units for name in _misshaped(context, unit)]
            for unit in self._units:
                context.attach(unit)
                context.pointers.note_changes(unit)
                if not context.pointers.stays(unit):
                    context.pointers.keep_changes(unit)  # .data is not watched
                context.let_go(unit)
            for unit in self._units:
                refresh_masters(context, unit)
        if replaced:
            raise UnsupportedError(
                f"the data of {', '.join(replaced)} was replaced by a tensor of another shape or "
                "dtype within materialize(); offload.unwrap() the model for that. Their values are "
                "what was in their own memory"
            )


def _misshaped(context: RuntimeContext, unit: Unit) -> list[str]:
    """Return the names of parameters whose data cannot go back, after giving them their own."""
    if not unit.attached:
        return []
    wrong = [
        param
        for param in unit.params
        if (param.param.shape, param.param.dtype) != (param.shape, param.dtype)
    ]
    for param in wrong:
        context.pointers.point(param)
    return [param.name for param in wrong]
