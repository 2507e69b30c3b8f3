"""AdamW with its state in memory and on disk: seconds of a step, and how near to what is possible.

`--only memory`: offload.AdamW with state in fp32, in bf16 and in 8 bits against torch's fused AdamW
and DeepSpeedCPUAdam; the limit is the memory bandwidth, measured with the same reads and writes.
`--only disk`: offload.AdamW with its state on disk, under a memory cgroup's cap. The limit is the
slower of the disk, where the swap store reads and writes as many bytes without an update, and the
update in memory. The peers are torch's AdamW with its state in a mapped file under the same cap,
and DeepSpeed's ZeRO-3 with the optimizer on NVMe, without a cap.

All contestants update the same parameters of a GPT, in processes of their own on the same number of
threads, and take turns in orders in which nobody always follows the same one. In memory each round
has new processes, since it matters where their memory lies.

    python benchmarks/optim.py                       # 100M parameters, about 6 minutes
    python benchmarks/optim.py --only disk --swap-dir /mnt/nvme
    python benchmarks/optim.py --peer-venv VENV      # with DeepSpeed: see benchmarks/io.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

from common import Bar, add_common_options, finish
from optim_peers import disk_comparison, memory_comparison
from optim_peers.field import Field
from optim_peers.parameters import gpt_shapes

SECTIONS = {"memory": memory_comparison.compare, "disk": disk_comparison.compare}
WIDTH, LAYERS = 768, 14
QUICK_WIDTH, QUICK_LAYERS = 128, 24


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces sizes and counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--only", choices=tuple(SECTIONS), help="one of the comparisons")
    add("--rounds", type=int, default=11, help="turns of each contestant")
    add("--layers", type=int, default=LAYERS, help="of the GPT, 7.1M parameters each")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contestant")
    add("--host-budget", type=int, default=128, metavar="MIB", help="for state that is on disk")
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    add("--peer-venv", metavar="PATH", help="virtual environment with DeepSpeed")
    options = parser.parse_args()
    options.width = WIDTH
    if options.quick:
        options.rounds, options.layers, options.width = 1, QUICK_LAYERS, QUICK_WIDTH
        options.host_budget = 16
    if min(options.rounds, options.layers, options.host_budget) < 1:
        parser.error("--rounds, --layers and --host-budget must be positive")
    if not 1 <= options.threads <= len(os.sched_getaffinity(0)):
        parser.error("--threads must be at least 1, and no more than there are cores")
    return options


def main() -> int:
    """Returns 1 if a bar fails."""
    options = parse_arguments()
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    shapes = gpt_shapes(options.layers, options.width)
    for name, compare in SECTIONS.items():
        if options.only not in (None, name):
            continue
        with Field(options, shapes) as field:
            found, held_to = compare(field)
        rows += found
        bars += [] if options.quick else held_to
    return finish(options, options.swap_dir, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
