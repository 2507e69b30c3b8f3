"""Training on a GPU with little of its memory: what a step takes, and how near to what is possible.

`--only transfers`: the core's copies between host and device against cudaMemcpyAsync on pinned
memory, of the same bytes, in turns.
`--only training`: a full fine-tuning step of a Llama in bf16, 16k tokens with checkpointed blocks,
by offload within a budget of device memory; by plain PyTorch on the whole card; by FSDP2's
CPUOffloadPolicy on one rank; and by torchao's CPUOffloadOptimizer, where it is installed. Each has
a process of its own, which has the card to itself; rounds repeat all of them. The limit is the
slowest of the compute alone (plain's step) and the copies each way at the rates of pinned memory.

    python benchmarks/gpu.py --swap-dir /mnt/nvme          # 7B: a card of 80 GB, 110 GiB of RAM
    python benchmarks/gpu.py --size 1b --only training
    python benchmarks/gpu.py --quick --device simulated    # without a GPU, its control flow alone
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Bar, add_common_options, finish, print_rows
from gpu_peers.llama import LlamaConfig
from gpu_peers.training import CONTESTANTS, NEED_CUDA, reason_to_leave_out
from worker import Json, Worker

GIB = 2**30
SIZES: dict[str, tuple[LlamaConfig, int, int]] = {
    "7b": (LlamaConfig(), 8, 2048),
    "1b": (LlamaConfig(width=2048, hidden=5632, layers=22), 8, 2048),
    "tiny": (LlamaConfig(vocabulary=256, width=64, hidden=160, layers=3, heads=4), 2, 32),
}
"""Shapes, sequences of a step, tokens of a sequence."""
DEVICE_BUDGET = {"7b": 24 * GIB, "1b": 4 * GIB, "tiny": 2**20}
COPY_BYTES = {"7b": 2**29, "1b": 2**27, "tiny": 2**20}
TRANSFER_BAR = 0.95
PLAIN_BAR = 0.90


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces sizes and counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--only", choices=("transfers", "training"), help="one of the two")
    add("--device", choices=("cuda", "simulated"), default="cuda")
    add("--size", choices=tuple(SIZES), default="7b", help="of the model and of the copies")
    add("--rounds", type=int, default=1, help="times that all contestants train")
    add("--steps", type=int, default=3, help="of each, after one that is not counted")
    add("--host-budget", type=float, metavar="GIB", help="of offload; default: what it needs")
    add("--without", action="append", default=[], choices=tuple(CONTESTANTS), help="leave out")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contestant")
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 1, 2
        options.size = "1b" if options.device == "cuda" else "tiny"
    if min(options.rounds, options.steps, options.threads) < 1:
        parser.error("--rounds, --steps and --threads must be positive")
    return options


def compare_transfers(
    options: argparse.Namespace, folder: str
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """(a row per direction and round, their bars)."""
    settings = {"device": options.device, "nbytes": COPY_BYTES[options.size]}
    rows: list[dict[str, Any]] = []
    bars = []
    log = Path(folder) / "transfers.log"
    with Worker(sys.executable, "gpu_peers.transfers", log, settings) as worker:
        for direction in ("h2d", "d2h"):
            worker.ask({"direction": direction, "round": 0})  # not counted
            found = [worker.ask({"direction": direction, "round": n}) for n in range(5)]
            rows += [
                {
                    "direction": direction,
                    "round": number,
                    "offload_gb_per_s": turn["ours"] / 1e9,
                    "pinned_gb_per_s": turn["pinned"] / 1e9,
                    "ratio": turn["ours"] / turn["pinned"],
                }
                for number, turn in enumerate(found, start=1)
            ]
            ratio = statistics.median(turn["ours"] / turn["pinned"] for turn in found)
            name = f"{direction}: offload's rate against pinned cudaMemcpyAsync's"
            bars.append(Bar(name, ratio, TRANSFER_BAR, at_least=True))
    print_rows("transfers", rows)
    return rows, bars


def host_budget(options: argparse.Namespace, config: LlamaConfig) -> int:
    """Bytes for parameters, gradients, an fp32 master and two moments in bf16, and some more."""
    if options.host_budget is not None:
        return int(options.host_budget * GIB)
    return 12 * config.params * 21 // 20 + GIB // 4


def train(options: argparse.Namespace, folder: str, name: str) -> Json:
    """One contestant's steps, and how it is said to have done."""
    config, batch, sequence = SIZES[options.size]
    settings = {
        "contestant": name,
        "device": options.device,
        "config": vars(config),
        "batch": batch,
        "sequence": sequence,
        "threads": options.threads,
        "host_budget": host_budget(options, config),
        "device_budget": DEVICE_BUDGET[options.size],
        "folder": tempfile.mkdtemp(prefix=f"{name}-", dir=folder),
    }
    log = Path(folder) / f"{name}.log"
    env = {"OMP_NUM_THREADS": str(options.threads)}
    with Worker(sys.executable, "gpu_peers.training", log, settings, env) as worker:
        worker.ask({"steps": 1})
        found = worker.ask({"steps": options.steps})
        found["made_s"] = worker.about["made_s"]
    return found


def row_of(name: str, number: int, found: Json, tokens: int) -> dict[str, Any]:
    """The row of one contestant in one round: medians over its steps."""
    steps = found["steps"]
    seconds = statistics.median(step["seconds"] for step in steps)

    def median(key: str) -> float | None:
        return statistics.median(step[key] for step in steps) if key in steps[0] else None

    return {
        "contestant": name,
        "round": number,
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "loss": steps[-1]["loss"],
        "device_peak_bytes": found["peak"],
        "to_device_bytes": median("to_device_bytes"),
        "to_host_bytes": median("to_host_bytes"),
        "update_s": median("update_seconds"),
        "made_s": found["made_s"],
    }


def stall_rows(found: Json) -> list[dict[str, Any]]:
    """What offload's training thread waited for: a row for each cause."""
    causes = {why for step in found["steps"] for why in step["stalls"]}
    return [
        {
            "waited_for": why,
            "s_per_step": statistics.mean(step["stalls"].get(why, 0.0) for step in found["steps"]),
        }
        for why in sorted(causes)
    ]


def compare_training(
    options: argparse.Namespace, folder: str, rates: dict[str, float]
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """(rows of the contestants, of the stalls and of the limit; the bars)."""
    _, batch, sequence = SIZES[options.size]
    rows: list[dict[str, Any]] = []
    stalls: list[dict[str, Any]] = []
    for number in range(1, options.rounds + 1):
        for name in CONTESTANTS:
            if name in options.without:
                continue
            why_not = reason_to_leave_out(name, options.device)
            if why_not is not None:
                print(f"{name}: {why_not}", flush=True)
                continue
            try:
                found = train(options, folder, name)
            except SystemExit as error:
                if name not in NEED_CUDA:
                    raise
                print(f"{name} failed and is left out: {error}", flush=True)
                continue
            rows.append(row_of(name, number, found, batch * sequence))
            print(f"{name}, round {number}: {rows[-1]['step_s']:.3g} s a step", flush=True)
            if name == "offload":
                stalls = stall_rows(found)
    if rows:
        print_rows("training", rows)
    if stalls:
        print_rows("what offload waited for, last round", stalls)
    speed = {
        name: statistics.median(r["tokens_per_s"] for r in rows if r["contestant"] == name)
        for name in dict.fromkeys(row["contestant"] for row in rows)
    }
    limits = limit_rows(
        [row for row in rows if row["contestant"] == "offload"], speed, rates, batch * sequence
    )
    if limits:
        print_rows("the limit", limits)
    return [*rows, *stalls, *limits], training_bars(speed)


def limit_rows(
    ours: list[dict[str, Any]], speed: dict[str, float], rates: dict[str, float], tokens: int
) -> list[dict[str, Any]]:
    """What no schedule beats: plain's compute or the copies each way; and how near offload is."""
    if not ours or "plain" not in speed or not rates:
        return []
    row = ours[-1]
    limits = {
        "compute_s": tokens / speed["plain"],
        "h2d_s": row["to_device_bytes"] / rates["h2d"],
        "d2h_s": row["to_host_bytes"] / rates["d2h"],
    }
    limit = max(limits.values())
    return [{**limits, "limit_s": limit, "fraction": limit / row["step_s"]}]


def training_bars(speed: dict[str, float]) -> list[Bar]:
    """Offload against plain, and against the peers."""
    ours = speed.get("offload")
    if ours is None:
        return []
    bars = []
    for name, theirs in speed.items():
        if name == "offload":
            continue
        target = PLAIN_BAR if name == "plain" else 1.0
        bars.append(
            Bar(f"tokens/s of offload against {name}", ours / theirs, target, at_least=True)
        )
    return bars


def main() -> int:
    """Returns 1 if a bar fails."""
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device: nothing is measured (see --device simulated)")
        return 0
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="offload-gpu-", dir=options.swap_dir) as folder:
        if options.only != "training":
            found, held_to = compare_transfers(options, folder)
            rows, bars = rows + found, bars + held_to
            for direction in ("h2d", "d2h"):
                turns = [r["pinned_gb_per_s"] for r in found if r["direction"] == direction]
                rates[direction] = statistics.median(turns) * 1e9
        if options.only != "transfers":
            found, held_to = compare_training(options, folder, rates)
            rows, bars = rows + found, bars + held_to
    if options.device != "cuda":
        bars = []  # nothing was measured that means anything
    return finish(options, options.swap_dir, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
