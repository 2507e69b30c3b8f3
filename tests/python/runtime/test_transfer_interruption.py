"""Ctrl-C on any line between the start of a transfer and its being noted: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import torch
import training as t
from interrupter import interrupted

from offload.tiers.flights import Flights
from offload.tiers.slab import Residency
from offload.tiers.unit import SpilledParameter, owner_of

TRACED = (Flights.start, Flights.note)
LINES = 60
"""More than a write and a read execute of them."""


def test_a_written_parameter_survives(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack))
    param = next(
        p
        for p in model.parameters()
        if isinstance(p, SpilledParameter)
        and p.ndim == 2
        and (o := owner_of(p)) is not None
        and not o.unit.param_slab.pinned
    )
    owner = owner_of(param)
    assert owner is not None
    context, slab = owner.context, owner.unit.param_slab

    def change() -> None:
        with torch.no_grad():
            param.add_(1.0)  # fetched, changed, on its way to disk
        context.mover.settle(slab)

    came = []
    for line in range(LINES):
        before = param.clone()
        came.append(interrupted(TRACED, line, change))
        context.recover()
        with context.lock:
            context.mover.write_back(slab)
            context.mover.settle(slab)
            assert slab.locks == 0, line
            assert not slab.dirty, line
            if slab.residency is Residency.HOST:
                context.mover.evict(slab)
        after = param.clone()
        assert torch.equal(after, before) or torch.equal(after, before + 1.0), line
    assert came[0]
    assert not came[-1]
