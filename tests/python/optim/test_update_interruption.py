"""Ctrl-C on any line between the beginning of an update and its being noted: it is done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family as f
import pytest
from interrupter import interrupted

from offload import optim
from offload.tiers.context import RuntimeContext
from offload.tiers.updates import Updates

TRACED = (Updates._start, Updates._submit)
LINES = 90
"""More than a step executes of them: from some number on nothing is interrupted."""


def step_interrupted(optimizer: Any, context: RuntimeContext, line: int) -> bool:
    """Take a step and finish it, interrupted at `line` once; return whether it was."""

    def flush() -> None:
        with context.lock:
            context.updates.flush()

    optimizer.step()
    came = interrupted(TRACED, line, flush)
    flush()
    return came


@pytest.mark.cpu_updates  # test_device_updates.py follows the others
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_update_is_done_once(name: str, tmp_path: Path) -> None:
    ours, theirs = f.Model(), f.Model()
    context = f.wrapped(ours, tmp_path)._offload_wrapped.context  # type: ignore[union-attr]
    optimizer = getattr(optim, name)(ours.parameters(), lr=0.1)
    real = f.reference(name, theirs.parameters(), lr=0.1)
    came = []
    for line in range(LINES):
        f.set_gradients(line, ours, theirs, missing=False)
        real.step()
        came.append(step_interrupted(optimizer, context, line))
        f.assert_same(ours, theirs)
        assert len(context.updates) == 0
        with context.lock:
            slabs = [s for u in context.units for s in (u.param_slab, u.grad_slab) if s is not None]
            assert not any(slab.locks for slab in slabs), line
    assert came[0]
    assert not came[-1]
