"""The benchmarks are scripts, not a package: their folder goes on the path, as when one is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload import _native

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

Quick = Callable[..., dict[str, Any]]


@pytest.fixture
def quick(tmp_path: Path) -> Quick:
    """Runs a benchmark with --quick and more arguments; what it wrote as JSON. It must succeed."""

    def run(script: str, *how: str) -> dict[str, Any]:
        found = tmp_path / "found.json"
        done = subprocess.run(
            [sys.executable, BENCHMARKS / script, "--quick", "--json", found, *how],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(found.read_text())
        return result

    return run


@pytest.fixture
def direct_folder(tmp_path: Path) -> Path:
    """A folder where the swap store has O_DIRECT."""
    store = _native.SwapStore(str(tmp_path))
    direct, note = store.direct, store.note
    store.close()
    if not direct:
        pytest.skip(f"no O_DIRECT here: {note}")
    return tmp_path
