"""A GPT of 2.5 billion parameters, 40 GB of fp32 training state, made and trained in 4 GiB.

The process is capped from its start: by a memory cgroup where there may be one, page cache
included, and by RLIMIT_DATA. Under that cap the model is initialised (offload.deferred_init),
wrapped, and takes optimizer steps; a last forward finishes the updates. The sequence is short: a
step is mostly disk.

    python benchmarks/large_model.py --swap-dir /mnt/nvme     # 55 GB of disk, some ten minutes
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cgroup import MemoryCgroup, NoCgroupError, memory_cgroup
from common import Bar, add_common_options, finish, print_rows
from large.training import FREE_AT_ONCE
from worker import Worker

MIB = 2**20
LEAST_PARAMS = 2_500_000_000
DISK_BYTES_PER_PARAM = 20
"""Parameters twice while wrap() moves them, gradients, two moments."""


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces sizes and counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--layers", type=int, default=32)
    add("--width", type=int, default=2560)
    add("--heads", type=int, default=32)
    add("--sequence", type=int, default=128, help="tokens of a step")
    add("--steps", type=int, default=2)
    add("--memory", type=int, default=4096, metavar="MIB", help="cap on the process")
    add("--host-budget", type=int, default=2560, metavar="MIB")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.heads, options.sequence = 6, 512, 8, 64
        options.memory, options.host_budget = 1024, 32
    return options


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row per phase, the row of the run)."""
    cap = options.memory * MIB
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="offload-large-", dir=options.swap_dir)
        )
        group: MemoryCgroup | None = None
        try:
            group = stack.enter_context(memory_cgroup(f"offload-large-{os.getpid()}"))
            group.limit(cap)
        except NoCgroupError as error:
            print(f"RLIMIT_DATA alone caps the process: {error}", flush=True)
        settings = {
            "config": {
                "layers": options.layers,
                "width": options.width,
                "heads": options.heads,
                "context": options.sequence,
            },
            "cap": cap,
            "host_budget": options.host_budget * MIB,
            "threads": options.threads,
            "folder": folder,
        }
        worker = stack.enter_context(
            Worker(
                sys.executable,
                "large.training",
                Path(folder) / "log",
                settings,
                FREE_AT_ONCE,
                before=group.enter if group is not None else (),
            )
        )
        rows = []
        for phase in ["make", "wrap", *["step"] * options.steps, "evaluate"]:
            if group is not None:
                group.reset_peak()
            found = worker.ask({"phase": phase})
            rows.append({**found, "cgroup_peak_bytes": None if group is None else group.peak()})
            print(f"{phase}: {found['seconds']:.1f} s", flush=True)
        about = {
            **worker.ask({"phase": "about"}),
            "cap_bytes": cap,
            "host_budget_bytes": options.host_budget * MIB,
            "sequence": options.sequence,
        }
        return rows, {**about, "state_bytes": 16 * about["params"]}


def main() -> int:
    """Returns 1 if a bar fails, 2 if the disk is too small."""
    options = parse_arguments()
    wanted = DISK_BYTES_PER_PARAM * 12 * options.layers * options.width**2
    wanted += options.host_budget * MIB
    free = shutil.disk_usage(options.swap_dir).free
    if free < wanted:
        print(f"{options.swap_dir} has {free / 1e9:.0f} GB free, {wanted / 1e9:.0f} GB are needed")
        return 2
    rows, about = run(options)
    peaks = [row["peak_rss_bytes"] for row in rows]
    peaks += [row["cgroup_peak_bytes"] for row in rows if row["cgroup_peak_bytes"] is not None]
    summary = about | {
        "seconds": sum(row["seconds"] for row in rows),
        "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows),
        "peak_bytes": max(peaks),
        "disk_bytes": max(row["disk_bytes"] for row in rows),
    }
    print_rows("phases", rows)
    print_rows("run", [{k: v for k, v in summary.items() if k != "stalls"}])
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    bars = [
        Bar("peak memory of the process, bytes", max(peaks), about["cap_bytes"]),
        Bar(
            "peak of what offload holds, bytes",
            about["arena_peak_bytes"],
            about["host_budget_bytes"],
        ),
        Bar("watched weights that differ from torch's", about["different"], 0),
        Bar("loss after the steps, against the one before", losses[-1], losses[0]),
    ]
    if not options.quick:
        bars.append(Bar("parameters", about["params"], LEAST_PARAMS, at_least=True))
    return finish(options, options.swap_dir, [*rows, summary], bars)


if __name__ == "__main__":
    sys.exit(main())
