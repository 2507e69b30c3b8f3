"""What becomes of activations: peak memory and step time of each mode, against plain PyTorch.

A GPT at a long sequence, where activations are most of the memory. Each mode runs in a process of
its own; they take one step each in turn, so that what else the machine does meets all alike.

    python benchmarks/activations.py                     # 12 layers, 2048 tokens, a few minutes
    python benchmarks/activations.py --from results/activations.json --plot activations.png

The limit of a mode is what no implementation of it could beat: the plain step; for "recompute" with
about the forward once more; where bytes go to disk, each half of the step takes no less than what
the disk, measured right after, needs for its bytes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Bar, add_common_options, finish, print_rows, raw_disk_rate
from worker import Worker

MODES = ("plain", "keep", "host", "disk", "recompute", "auto")
_RATE_BYTES = 256 << 20
_MIB = 2**20
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""Of every contestant. Else glibc raises these as it goes, and keeps what tensors gave back: a heap
with holes, whose size is that of its history and not of what is in use."""


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces the model and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--layers", type=int, default=12)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--sequence", type=int, default=2048)
    add("--batch", type=int, default=1)
    add("--room", type=int, default=64, help="MiB of memory for activations (host: all of them)")
    add("--steps", type=int, default=9, help="of each mode")
    add("--drop", type=int, default=3, help="first steps that are not counted")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--threads", type=int, default=2)
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    add("--plot", metavar="FILE", help="draw the bars here; needs matplotlib")
    add("--from", metavar="FILE", dest="source", help="do not run: take the rows of this JSON")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.sequence = 4, 128, 256
        options.room, options.steps = 4, 4
    if "plain" not in options.modes or not 0 <= options.drop < options.steps:
        parser.error("--modes must have plain, and --drop must be less than --steps")
    return options


def settings(options: argparse.Namespace, mode: str) -> dict[str, Any]:
    """What the process of `mode` is told."""
    width, tokens = options.width, options.sequence * options.batch
    params = options.layers * 12 * width**2 + (options.sequence + 512) * width
    state = 20 * params + 64 * _MIB
    # 17 times the residual stream is saved by a block, and as much again is room to spare.
    everything = 2 * options.layers * 17 * tokens * width * 4
    room = everything if mode == "host" else options.room * _MIB
    return {
        "mode": mode,
        "layers": options.layers,
        "width": width,
        "heads": options.heads,
        "sequence": options.sequence,
        "batch": options.batch,
        "threads": options.threads,
        "swap_dir": options.swap_dir,
        "host_bytes": state + room,
        "room_bytes": room,
    }


def run(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Steps by mode, taken in turn, and the number of parameters."""
    steps: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
    params = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {
            mode: stack.enter_context(
                Worker(
                    sys.executable,
                    "activations_contestant",
                    Path(folder, f"{mode}.log"),
                    settings(options, mode),
                    _MALLOC,
                )
            )
            for mode in options.modes
        }
        for _ in range(options.steps):
            for mode, worker in workers.items():
                steps[mode].append(worker.ask({}))
        params = workers["plain"].about["params"]
    return steps, params


def make_rows(
    options: argparse.Namespace, steps: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The table: medians of the counted steps of each mode."""
    read_rate = raw_disk_rate(options.swap_dir, 1.0, _RATE_BYTES)
    write_rate = raw_disk_rate(options.swap_dir, 0.0, _RATE_BYTES)
    counted = {mode: found[options.drop :] for mode, found in steps.items()}

    def median(mode: str, key: str) -> float:
        return float(statistics.median(step.get(key, 0) for step in counted[mode]))

    plain, forward = median("plain", "seconds"), median("plain", "forward_seconds")
    rows = []
    for mode in steps:
        written = median(mode, "activation_write_bytes")
        read = median(mode, "activation_read_bytes")
        again = forward if mode == "recompute" else 0.0
        limit = max(forward, written / write_rate) + max(plain - forward + again, read / read_rate)
        seconds = [step["seconds"] for step in counted[mode]]
        rows.append(
            {
                "mode": mode,
                "step_s": statistics.median(seconds),
                "min_s": min(seconds),
                "max_s": max(seconds),
                "ratio": statistics.median(
                    ours / theirs["seconds"]
                    for ours, theirs in zip(seconds, counted["plain"], strict=True)
                ),
                "limit_s": limit,
                "reached": limit / statistics.median(seconds),
                "peak_rss_mib": max(step["peak_rss_bytes"] for step in steps[mode]) / _MIB,
                "saved_mib": median(mode, "activation_saved_bytes") / _MIB,
                "write_mib": written / _MIB,
                "read_mib": read / _MIB,
                "stall_s": median(mode, "stall_seconds"),
                "same_losses": [s["loss"] for s in steps[mode]]
                == [s["loss"] for s in steps["plain"]],
                "disk_read_mb_s": read_rate / 1e6,
                "disk_write_mb_s": write_rate / 1e6,
            }
        )
    return rows


def make_bars(rows: Sequence[dict[str, Any]], quick: bool) -> list[Bar]:
    """Losses are the same bits; modes that move or recompute take less memory than plain.

    With `quick` sizes the process itself is most of the memory.
    """
    by_mode = {row["mode"]: row for row in rows}
    plain = by_mode["plain"]["peak_rss_mib"]
    bars = [Bar("modes whose losses differ from plain", sum(not r["same_losses"] for r in rows), 0)]
    if quick:
        return bars
    bars += [
        Bar(f"{mode}: peak memory / plain's", by_mode[mode]["peak_rss_mib"] / plain, 1.0)
        for mode in ("disk", "recompute", "auto")
        if mode in by_mode
    ]
    return bars


def draw(rows: Sequence[dict[str, Any]], title: str, path: str) -> None:
    """Two panels of bars: peak memory and step time, the limit as a mark."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib: {error}") from None
    modes = [row["mode"] for row in rows]
    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    bars = memory.bar(modes, [row["peak_rss_mib"] for row in rows], color="#4878a8")
    memory.bar_label(bars, fmt="%.0f", padding=2)
    memory.set_ylabel("peak resident memory, MiB")
    step = [row["step_s"] for row in rows]
    spread = [
        [row["step_s"] - row["min_s"] for row in rows],
        [row["max_s"] - row["step_s"] for row in rows],
    ]
    seconds.bar(modes, step, color="#c8965a", yerr=spread, capsize=3, label="median, min to max")
    seconds.plot(modes, [row["limit_s"] for row in rows], "k_", markersize=22, label="limit")
    seconds.set_ylabel("step, s")
    seconds.legend(loc="upper left", framealpha=1)
    seconds.set_ylim(0, 1.25 * max(row["max_s"] for row in rows))
    for axis in (memory, seconds):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.1)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run or read, print, and draw if asked to."""
    options = parse_arguments()
    title = f"GPT, {options.layers} layers of {options.width}, {options.sequence} tokens"
    if options.source is not None:
        rows = json.loads(Path(options.source).read_text(encoding="utf-8"))["rows"]
        code = 0
    else:
        steps, params = run(options)
        rows = make_rows(options, steps)
        for note in (n for n in steps.get("auto", [{"notes": []}])[-1]["notes"] if "blocks" in n):
            print(note)
        print_rows(f"{title}, {params / 1e6:.1f}M parameters", rows)
        code = finish(options, options.swap_dir, rows, make_bars(rows, options.quick))
    if options.plot is not None:
        draw(rows, title, options.plot)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
