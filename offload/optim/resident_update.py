"""Updates of wrapped models that stay in memory whole: as those of plain ones, in their slabs."""

from __future__ import annotations

from collections.abc import Sequence

from offload.errors import OffloadError
from offload.optim.memory_update import MemoryUpdater
from offload.optim.param_state import ParamState, ResidentState
from offload.optim.update import Update
from offload.tiers.context import RuntimeContext
from offload.tiers.unit import Unit


def update_resident(updates: Sequence[Update], seed: int, memory: MemoryUpdater) -> None:
    """Take one step for each of `updates`, whose states are ResidentStates; it is done then.

    With a lazy policy too: nothing would run beside the next forward but the CPU.
    """
    units: dict[Unit, RuntimeContext] = {}
    for update in updates:
        kept = _resident(update.kept)
        units.setdefault(kept.owner.unit, kept.context)
    for unit, context in units.items():
        with context.lock:
            context.begin_resident_update(unit)
    memory.run(updates, seed)
    for unit, context in units.items():
        with context.lock:
            context.end_resident_update(unit)


def _resident(kept: ParamState) -> ResidentState:
    if not isinstance(kept, ResidentState):
        raise OffloadError("the state is not that of a unit in memory (internal error)")
    return kept
