"""A billion parameters trained in a process of 1 GiB: 12 GB of parameters and moments, eager steps.

A wrapped tower of linear layers takes ordinary steps with offload.AdamW and lazy_step=False, so
`opt.step()` streams every parameter, gradient and moment through the host budget before it returns.
The cap is on all memory of the process: a memory cgroup's limit where there may be one, and
RLIMIT_DATA. It is set when the model has been wrapped: until then the model is whole in memory.

    python benchmarks/optim_billion.py --swap-dir /mnt/nvme     # 17 GB of disk, a few minutes
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cgroup import MemoryCgroup, NoCgroupError, memory_cgroup
from common import Bar, add_common_options, finish, print_rows
from optim_peers.billion import FREE_AT_ONCE
from optim_peers.engine import SETTINGS
from optim_peers.field import fastest
from worker import Worker

MIB = 2**20
LEAST_PARAMS = 10**9
SAMPLE_BYTES = 1024 * MIB


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces sizes and counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--layers", type=int, default=240)
    add("--width", type=int, default=2048, help="of a layer; 4.2M parameters each")
    add("--steps", type=int, default=3)
    add("--memory", type=int, default=1024, metavar="MIB", help="cap on the process")
    add("--host-budget", type=int, default=512, metavar="MIB")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.steps, options.host_budget = 16, 512, 2, 16
    if min(options.layers, options.width, options.steps) < 1:
        parser.error("--layers, --width and --steps must be positive")
    return options


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row per step, the row of the run)."""
    cap = options.memory * MIB
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="offload-billion-", dir=options.swap_dir)
        )
        group: MemoryCgroup | None = None
        try:
            name = f"offload-billion-{os.getpid()}"
            group = stack.enter_context(memory_cgroup(name))
        except NoCgroupError as error:
            print(f"RLIMIT_DATA alone caps the process: {error}", flush=True)
        settings = {
            "layers": options.layers,
            "width": options.width,
            "host_budget": options.host_budget * MIB,
            "threads": options.threads,
            "folder": folder,
        }
        worker = stack.enter_context(
            Worker(
                sys.executable,
                "optim_peers.billion",
                Path(folder) / "log",
                settings,
                FREE_AT_ONCE,
                before=group.enter if group is not None else (),
            )
        )
        print_rows(f"{worker.about['params'] / 1e6:.0f}M parameters", worker.about["plan"])
        if group is not None:
            group.limit(cap)
            group.reset_peak()
        worker.ask({"cap": cap})
        rows = []
        for number in range(1, options.steps + 1):
            found = worker.ask({})
            peak = None if group is None else group.peak()
            rows.append({"step": number, **found, "cgroup_peak_bytes": peak})
            print(f"step {number} of {options.steps}: {found['step_s']:.1f} s", flush=True)
        about = {
            "params": worker.about["params"],
            "state_bytes": 12 * worker.about["params"],
            "cap_bytes": cap,
            "host_budget_bytes": options.host_budget * MIB,
        }
        return rows, about


def disk_alone(options: argparse.Namespace, read: float, written: float) -> float:
    """Seconds in which the swap store moves as many bytes and does nothing else.

    Measured on as much as SAMPLE_BYTES of them, with the settings that are fastest.
    """
    share = min(1.0, SAMPLE_BYTES / (read + written))
    request = {"read": int(read * share), "written": int(written * share)}
    with tempfile.TemporaryDirectory(prefix="offload-engine-", dir=options.swap_dir) as folder:
        settings = {"folder": folder, "span": max(request.values())}
        with Worker(sys.executable, "optim_peers.engine", Path(folder) / "log", settings) as worker:
            best = fastest(worker, [{**request, **s} for s in SETTINGS], options.quick)
            return float(worker.ask(best)["seconds"]) / share


def main() -> int:
    """Returns 1 if a bar fails."""
    options = parse_arguments()
    rows, about = run(options)
    later = rows[1:] or rows  # the first step reads no moments
    step = statistics.median(row["step_s"] for row in later)
    read = statistics.median(row["read_bytes"] for row in later)
    written = statistics.median(row["written_bytes"] for row in later)
    disk = disk_alone(options, read, written)
    peaks = [row["peak_rss_bytes"] for row in rows]
    peaks += [row["cgroup_peak_bytes"] for row in rows if row["cgroup_peak_bytes"] is not None]
    summary = about | {
        "step_s": step,
        "disk_alone_s": disk,
        "limit_reached": disk / step,
        "bytes_per_param": (read + written) / about["params"],
        "peak_bytes": max(peaks),
    }
    print_rows("steps", rows)
    print_rows("run", [summary])
    bars = [
        Bar("peak memory of the process, bytes", max(peaks), about["cap_bytes"]),
        Bar(
            "peak of what offload holds, bytes",
            max(row["arena_peak_bytes"] for row in rows),
            about["host_budget_bytes"],
        ),
        Bar("watched weights that differ from torch's", sum(r["different"] for r in rows), 0),
    ]
    if not options.quick:
        bars.append(Bar("parameters", about["params"], LEAST_PARAMS, at_least=True))
    return finish(options, options.swap_dir, [*rows, summary], bars)


if __name__ == "__main__":
    sys.exit(main())
