"""CPU time that a request of 1 MiB costs: the engine alone, the swap store, the checksum's share.

Compiles benchmarks/native/request_overhead.cc (with the cmake of this Python) and runs it several
times. User time is the core's own; system time is the kernel's share of the same requests, which
every program pays that transfers as much (fio's is in the table of benchmarks/io.py).

    python benchmarks/overhead.py --swap-dir /mnt/nvme
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from common import Bar, add_common_options, finish, print_rows
from native_program import compile_program

MOST_US = 5.0
RUNS = {
    "engine_read": "engine alone, read",
    "engine_write": "engine alone, write",
    "store_page_read": "store, read of a page in place of 1 MiB",
    "store_page_write": "store, write of a page in place of 1 MiB",
    "store_read": "store, read",
    "store_write": "store, write",
    "checksum": "CRC32C of 1 MiB alone",
}


def main() -> int:
    """Returns 1 if a bar fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    options = parser.parse_args()
    size, requests = (64, 256) if options.quick else (1024, 8192)
    rounds = 1 if options.quick else options.rounds
    command = [compile_program("request_overhead"), options.swap_dir, str(size), str(requests)]
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(run.stdout))
    rows = [
        {
            "request of 1 MiB": RUNS[name],
            "user_us": statistics.median(f[name]["user_us"] for f in found),
            "system_us": statistics.median(f[name]["system_us"] for f in found),
        }
        for name in RUNS
    ]
    print_rows(f"CPU time per request, medians of {rounds} runs of {requests} requests", rows)
    bars = []
    for op in ("read", "write"):
        engine = statistics.median(f[f"engine_{op}"]["user_us"] for f in found)
        bars.append(Bar(f"engine, {op}: user us per MiB", engine, MOST_US))
        store = statistics.median(f[f"store_page_{op}"]["user_us"] for f in found)
        bars.append(Bar(f"store but for the checksum, {op}: user us per request", store, MOST_US))
    return finish(options, options.swap_dir, rows, [] if options.quick else bars)


if __name__ == "__main__":
    sys.exit(main())
