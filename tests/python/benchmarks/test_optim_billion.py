"""benchmarks/optim_billion.py, in small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Quick = Callable[..., dict[str, Any]]


def test_training_under_a_cap(quick: Quick, direct_folder: Path) -> None:
    result = quick("optim_billion.py", "--swap-dir", str(direct_folder))
    assert all(bar["holds"] for bar in result["bars"])
    *steps, run = result["rows"]
    assert len(steps) == 2
    assert steps[0]["read_bytes"] < steps[1]["read_bytes"]  # the first makes the moments
    # in the second everything is on disk but for the gradients that the budget had room for: 4
    # reads and 3 writes of fp32, and of gradients what the backward had not finished to write
    assert 24 < run["bytes_per_param"] < 33
    assert [path.name for path in direct_folder.iterdir()] == ["found.json"]
