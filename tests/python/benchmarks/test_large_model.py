"""benchmarks/large_model.py, in small."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Quick = Callable[..., dict[str, Any]]


def test_making_and_training_under_a_cap(quick: Quick, direct_folder: Path) -> None:
    result = quick("large_model.py", "--swap-dir", str(direct_folder))
    assert all(bar["holds"] for bar in result["bars"])
    *phases, run = result["rows"]
    assert [row["phase"] for row in phases] == ["make", "wrap", "step", "step", "evaluate"]
    made, wrapped, first, second, _ = phases
    parameters = 4 * run["params"]
    assert 0.9 * parameters < made["disk_bytes"] < 1.5 * parameters  # norms and biases in memory
    assert wrapped["disk_bytes"] > 4 * parameters  # reserved, for gradients and moments too
    assert first["read_bytes"] < second["read_bytes"]  # which has moments
    assert [path.name for path in direct_folder.iterdir()] == ["found.json"]


def test_a_disk_that_is_too_small_is_said_so() -> None:
    root = Path(__file__).resolve().parents[3]
    script = root / "benchmarks" / "large_model.py"
    done = subprocess.run(
        [sys.executable, script, "--layers", "10000", "--width", "100000"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 2
    assert "are needed" in done.stdout
