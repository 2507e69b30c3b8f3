"""The beginning of optimizer state: room for it, and what it holds at first."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

from offload.optim.param_state import MemoryState, ParamState, ResidentState, SlabState, UnitState
from offload.optim.rule import Rule
from offload.optim.state_codec import encode
from offload.tiers.state_layout import StateArray, StateLayout
from offload.tiers.state_slabs import StateSlabs, provide

_LATER = 1 << 32
"""More than there are units."""


def provide_state(wanted: Sequence[tuple[ParamState, StateLayout]]) -> None:
    """Make room in the tiers for what `wanted` lacks.

    Raises:
        BudgetError, SwapSpaceError: there is none; nothing was changed in the home that has none.
    """
    runs: dict[Any, list[tuple[int, StateSlabs, StateLayout]]] = {}
    for kept, layout in wanted:
        if isinstance(kept, SlabState):  # small ones first: on disk they would cost a request each
            runs.setdefault(kept.run.home, []).append((kept.run.numel, kept.run, layout))
        elif isinstance(kept, UnitState):  # as planned, and otherwise in the order of the model
            rank = kept.owner.unit.index + (0 if kept.planned_in_memory else _LATER)
            runs.setdefault(kept.run.home, []).append((rank, kept.run, layout))
    for home, ranked in runs.items():
        ranked.sort(key=lambda item: item[0])
        with home.lock:
            provide([(run, layout) for _, run, layout in ranked])


def begin_state(
    rule: Rule,
    state: MutableMapping[Any, dict[str, Any]],
    kept: ParamState,
    layout: StateLayout,
    group: dict[str, Any],
) -> None:
    """Begin the arrays of `layout` that `kept` lacks; provide_state() made room for them.

    What `state` (of the optimizer) holds for a parameter whose model was wrapped since moves over.
    """
    earlier = {} if isinstance(kept, MemoryState) else state.get(kept.param, {})
    master = layout.master
    if master is not None and not kept.has(master) and not _adopt(kept, master, earlier):
        kept.begin_master(master)
    for k, array in enumerate(layout.states):
        if kept.has(array):
            continue
        scale = layout.scales[k] if layout.scales else None
        if _adopt(kept, array, earlier):
            if scale is not None:
                _adopt(kept, scale, earlier)
            continue
        codes = scales = None
        initial = rule.initial(group, array.name)
        if initial:
            values = torch.full((kept.param.numel(),), initial)
            codes, scales = encode(rule, array.name, values)
        kept.begin(array, codes)
        if scale is not None:
            kept.begin(scale, scales)
        kept.fresh = True
    if isinstance(kept, MemoryState | ResidentState):
        kept.bind(layout)
    kept.layout = layout


def _adopt(kept: ParamState, array: StateArray, earlier: dict[str, Any]) -> bool:
    value = earlier.pop(array.name, None)
    if value is None:
        return False
    kept.begin(array, value if array.per > 1 else kept.flat(value))
    return True
