"""benchmarks/activations.py, a few small steps of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Quick = Callable[..., dict[str, Any]]


def test_every_mode_takes_the_steps_of_plain_training(quick: Quick, direct_folder: Path) -> None:
    result = quick("activations.py", "--swap-dir", str(direct_folder))
    rows = {row["mode"]: row for row in result["rows"]}
    assert list(rows) == ["plain", "keep", "host", "disk", "recompute", "auto"]
    assert all(row["same_losses"] for row in rows.values())
    assert all(row["step_s"] > 0 and row["peak_rss_mib"] > 0 for row in rows.values())
    assert rows["disk"]["write_mib"] > 0
    assert rows["disk"]["read_mib"] > 0
    assert rows["host"]["saved_mib"] > 0
    for mode in ("plain", "keep"):
        assert rows[mode]["write_mib"] == rows[mode]["saved_mib"] == 0
    assert rows["recompute"]["write_mib"] == 0
    assert rows["recompute"]["saved_mib"] < rows["host"]["saved_mib"] / 2  # inputs of blocks


def test_it_can_be_drawn(quick: Quick, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "bars.png"
    quick("activations.py", "--modes", "plain", "keep", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
