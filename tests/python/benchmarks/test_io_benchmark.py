"""benchmarks/io.py: that it runs to its end, measures what it says, and sees what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from offload import _native

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from common import Bar  # noqa: E402
from io_peers import huge_pages  # noqa: E402
from io_peers.measurement import Meter, Progress  # noqa: E402


def run_benchmark(folder: Path, *how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "io.py"), "--quick", "--swap-dir", str(folder)]
    return subprocess.run(
        [*command, *how],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """A folder where the store has O_DIRECT."""
    store = _native.SwapStore(str(tmp_path))
    direct, note = store.direct, store.note
    store.close()
    if not direct:
        pytest.skip(f"no O_DIRECT here: {note}")
    return tmp_path


@pytest.fixture
def disk(direct: Path) -> Path:
    """Such a folder; fio is there too."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    return direct


def test_quick_run(disk: Path) -> None:
    found = disk / "found.json"
    peer = str(disk / "no-such-venv")
    run = run_benchmark(disk, "--json", str(found), "--peer-venv", peer)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(found.read_text())
    rounds = [row for row in result["rows"] if "round" in row]
    summaries = {(r["workload"], r["run"]): r for r in result["rows"] if "run" in r}
    assert [row["workload"] for row in rounds] == ["read", "write", "mix"]
    for row in rounds:
        ratio = row["offload_mb_per_s"] / row["fio_mb_per_s"]
        assert row["ratio_to_fio"] == pytest.approx(ratio)
        for name in ("offload", "fio"):
            line = summaries[row["workload"], name]
            assert line["mb_per_s"] == row[f"{name}_mb_per_s"] > 0
            assert 0 < line["limit_reached"] <= 1
            assert line["cpu_s_per_gb"] > 0
        skipped = summaries[row["workload"], "deepspeed"]
        assert skipped["settings"] == "not installed: skipped"
    assert [path.name for path in disk.iterdir()] == ["found.json"]


def test_only_one_workload(disk: Path) -> None:
    found = disk / "found.json"
    run = run_benchmark(disk, "--only", "write", "--json", str(found))
    assert run.returncode == 0, run.stderr
    assert {row["workload"] for row in json.loads(found.read_text())["rows"]} == {"write"}


@pytest.mark.parametrize("workload", ["write", "mix"])
def test_the_store_writes_what_its_peers_write(direct: Path, workload: str) -> None:
    from io_peers.measurement import MIB, PATTERN
    from worker import Worker

    settings = {"folder": str(direct), "size": 64 * MIB, "buffers": 18 * MIB}
    with Worker(sys.executable, "io_peers.swap_store", direct / "log", settings) as store:
        for place in (0, 32 * MIB):
            found = store.ask({"workload": workload, "seconds": 0.2, "start": place})
            assert found["written_bytes"] > 0
        with Path(store.about["file"]).open("rb") as file:
            for _ in range(64):
                assert file.read(MIB) == PATTERN * (MIB // len(PATTERN))


def test_a_missing_folder_is_an_error(disk: Path) -> None:
    run = run_benchmark(disk / "missing")
    assert run.returncode != 0
    assert "missing" in run.stderr


def test_a_worker_that_fails_says_why(disk: Path) -> None:
    from worker import Worker

    settings = {"folder": str(disk / "missing"), "size": 2**28, "buffers": 3 * 2**20}
    with pytest.raises(SystemExit, match=r"(?s)io_peers.swap_store ended with 1.*missing"):
        Worker(sys.executable, "io_peers.swap_store", disk / "log", settings)


def test_bars_have_a_direction() -> None:
    assert Bar("at most", 1.0, 2.0).holds
    assert not Bar("at most", 3.0, 2.0).holds
    assert Bar("at least", 3.0, 2.0, at_least=True).holds
    assert not Bar("at least", 1.0, 2.0, at_least=True).holds
    assert not Bar("no number", float("nan"), 2.0, at_least=True).holds


def test_the_meter_leaves_the_ramp_out() -> None:
    moved = 0
    meter = Meter(0.05, lambda: Progress(moved, 2 * moved, 0.0))
    started = time.perf_counter()
    running, total = True, 0.0
    while running:
        time.sleep(0.01)
        moved += 100
        running = meter.running()
    total = time.perf_counter() - started
    found = meter.result()
    assert 0.05 <= found.seconds < total - 0.25
    assert found.written_bytes == 2 * found.read_bytes
    assert 100 <= found.read_bytes < moved
    assert found.rate == pytest.approx(3 * found.read_bytes / found.seconds)


def test_an_unfinished_measurement_has_no_result() -> None:
    meter = Meter(60.0, lambda: Progress(0, 0))
    assert meter.running()
    with pytest.raises(RuntimeError, match="ended before"):
        meter.result()


def test_huge_pages_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "nr_hugepages"
    count.write_text("3")
    page = 2 * 2**20

    def meminfo() -> dict[str, int]:
        total = int(count.read_text())
        return {"Hugepagesize": page, "HugePages_Total": total, "HugePages_Free": total - 1}

    monkeypatch.setattr(huge_pages, "_COUNT", count)
    monkeypatch.setattr(huge_pages, "_meminfo", meminfo)
    with huge_pages.reserved_huge_pages(5 * page) as reserved:
        assert reserved
        assert count.read_text() == "6"
    assert count.read_text() == "3"
    monkeypatch.setattr(huge_pages, "_COUNT", tmp_path)  # not to be written to
    with huge_pages.reserved_huge_pages(5 * page) as reserved:
        assert not reserved
