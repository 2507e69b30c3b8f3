"""What the benchmarks share: machine, tables, bars, their JSON, DeepSpeed's Python, a disk rate."""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

_BLOCK = 4 * 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """A number that must stay at or below its target, or with `at_least` at or above it."""

    name: str
    value: float
    target: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether it does; a value that is not a number never does."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The two options every benchmark takes."""
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes; smaller sizes")
    parser.add_argument("--json", metavar="FILE", help="write {machine, rows, bars} here")


def machine(folder: str) -> dict[str, Any]:
    """The machine a result was taken on, and the disk below `folder`."""
    import torch

    point, source, filesystem = _mount_of(folder)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": pages,
        "kernel": platform.release(),
        "disk": {"device": source, "mount": point, "filesystem": filesystem},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": _gpu(),
    }


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {"name": found.name, "bytes": found.total_memory, "cuda": torch.version.cuda}


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as info:
        for line in info:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields.get("model name") or fields.get("CPU part") or platform.machine()


def _mount_of(folder: str) -> tuple[str, str, str]:
    """(mount point, device, filesystem) that `folder` lies on."""
    path = os.path.realpath(folder)
    best = ("", "", "")
    with Path("/proc/mounts").open(encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            source, point, filesystem, *_ = line.split()
            below = path == point or path.startswith(point.rstrip("/") + "/")
            if below and len(point) >= len(best[0]):
                best = (point, source, filesystem)
    return best


def in_turn(contestants: Sequence[T], number: int) -> list[T]:
    """Everyone, in the order of round `number`: it rotates, and every other one goes backwards.

    So nobody is always measured after the same one: what a turn leaves behind (a host that still
    writes, above all) would be counted against the next.
    """
    first = number % len(contestants)
    order = [*contestants[first:], *contestants[:first]]
    return order[::-1] if number % 2 else order


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table whose columns are the keys of the first row."""
    print(title)
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print(
            "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        )
    print(flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(
    options: argparse.Namespace,
    folder: str,
    rows: Sequence[Mapping[str, Any]],
    bars: Sequence[Bar],
) -> int:
    """Prints the bars, writes the JSON if asked to. Returns the exit code: 1 if a bar fails."""
    for bar in bars:
        verdict = "holds" if bar.holds else "FAILS"
        side = "at least" if bar.at_least else "at most"
        print(f"{verdict}  {bar.name}: {bar.value:.6g}, {side} {bar.target:.6g}")
    if options.json is not None:
        found = {
            "machine": machine(folder),
            "quick": options.quick,
            "rows": list(rows),
            "bars": [{**asdict(bar), "holds": bar.holds} for bar in bars],
        }
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(bar.holds for bar in bars) else 1


def deepspeed_python(venv: str | None) -> tuple[str, dict[str, str]] | None:
    """The Python that has DeepSpeed and what its environment needs; None where none has it."""
    if venv is None:
        found = importlib.util.find_spec("deepspeed") is not None
        return (sys.executable, {}) if found else None
    programs = Path(venv).resolve() / "bin"
    if not (programs / "python").exists():
        return None
    find = "from importlib.util import find_spec as f; raise SystemExit(f('deepspeed') is None)"
    if subprocess.run([programs / "python", "-c", find], check=False).returncode != 0:
        return None
    return str(programs / "python"), {
        "TORCH_EXTENSIONS_DIR": str(programs.parent / "torch_extensions"),
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def raw_disk_rate(folder: str, read_share: float, total: int) -> float:
    """Bytes per second of plain O_DIRECT transfers in `folder`, `read_share` of them reads.

    Four threads move `total` bytes in blocks of 4 MiB, on an unnamed file that was written before,
    so that no read is answered from an unwritten extent. Raises OSError where the filesystem has
    no O_DIRECT or no unnamed files.
    """
    threads = 4
    per_thread = max(4, total // _BLOCK // threads)
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    try:
        buffers = [mmap.mmap(-1, _BLOCK) for _ in range(threads)]
        for buffer in buffers:
            buffer.write(os.urandom(_BLOCK))

        def transfer(thread: int, share: float) -> None:
            done_reads = 0
            for i in range(per_thread):
                offset = (thread * per_thread + i) * _BLOCK
                reading = done_reads < share * (i + 1)
                done_reads += reading
                step = os.preadv if reading else os.pwritev
                count = step(file, [buffers[thread]], offset)
                if count != _BLOCK:
                    raise OSError(f"{folder}: short transfer, {count} of {_BLOCK} bytes")

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(transfer, range(threads), [0.0] * threads))
            started = time.perf_counter()
            list(pool.map(transfer, range(threads), [read_share] * threads))
            seconds = time.perf_counter() - started
        return threads * per_thread * _BLOCK / seconds
    finally:
        os.close(file)
