""".ci/gpu, for machines with a GPU: what it would do, and how parts that fail are told."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / ".ci" / "gpu", *arguments], capture_output=True, text=True, check=False
    )


def test_a_dry_run_prints_parts_that_fit_in_ten_minutes(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = run("--dry-run", folder)
    assert done.returncode == 0, done.stderr
    parts = {line.split()[0]: line.split(maxsplit=3) for line in done.stdout.splitlines()}
    assert list(parts)[:2] == ["machine", "build"]
    assert sum(int(part[1]) for part in parts.values()) <= 600
    for word in ("memcheck", "racecheck", "-m gpu", "benchmarks/gpu.py"):
        assert word in done.stdout
    assert "pip install" not in done.stdout
    assert not folder.exists()


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine has a GPU")
    folder = tmp_path / "out"
    done = run("--only", "machine", folder)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    (part,) = json.loads((folder / "parts.json").read_text())
    assert part["part"] == "machine"
    assert part["exit"] != 0
    assert "nvidia-smi" in (folder / "machine.log").read_text()


@pytest.mark.parametrize("arguments", [[], ["--only"], ["--wrong", "x"], ["--only", "none", "x"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2
