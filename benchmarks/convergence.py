"""Does optimizer state in bf16 or in 8 bits train as well as in fp32? The demo's GPT on real text.

The same model, seed and batches are trained with offload.AdamW and its state in each format, with
warm-up, a cosine schedule and clipping. What is compared is the loss at the end, the mean of the
last steps, since single steps differ by what text they saw.

    python benchmarks/convergence.py                        # 300 steps each, about 10 minutes
    python benchmarks/convergence.py --plot curves.png      # needs matplotlib
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import offload

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from common import Bar, add_common_options, finish, print_rows
from gpt import (
    GPT,
    PRESETS,
    GPTConfig,
    learning_rate_factor,
    loss_of,
    parameter_groups,
)
from text_data import TextData, open_data

StateFormat = Literal["float32", "bfloat16", "int8"]
FORMATS: tuple[StateFormat, ...] = ("float32", "bfloat16", "int8")
MOST_OVER_FP32 = 1.01
LEARNING_RATE, WARMUP = 1e-3, 30
CURVE_WIDTH = 10
"""Steps over which the plot's curves are averaged."""


@dataclass
class Run:
    """One training; `losses` has one entry per step."""

    state_format: StateFormat
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def last(self, count: int) -> float:
        """The mean loss of the last `count` steps."""
        return statistics.fmean(self.losses[-count:])


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=16, help="windows of 128 bytes in a step")
    add("--last", type=int, default=20, help="steps whose mean loss is compared")
    add("--seed", type=int, default=0)
    add("--data", metavar="PATH", help="text; default: the standard library's sources")
    add("--plot", metavar="FILE", help="draw the loss curves here")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batch, options.last = 4, 2, 2
    if not 1 <= options.last <= options.steps or options.batch < 1:
        parser.error("--last must be from 1 to --steps, and --batch positive")
    return options


def train(
    state_format: StateFormat, config: GPTConfig, data: TextData, options: argparse.Namespace
) -> Run:
    """Trains a new model; the seed makes its weights and its batches those of every other run."""
    torch.manual_seed(options.seed)
    model = GPT(config)
    optimizer = offload.AdamW(
        parameter_groups(model, decay=0.1),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        state_format=state_format,
        seed=options.seed,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, WARMUP, options.steps)
    )
    run = Run(state_format)
    started = time.perf_counter()
    for step in range(options.steps):
        loss = loss_of(model, data.windows(step, 0, options.batch, config.context + 1))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"{state_format}, step {step + 1}: loss {run.losses[-1]:.4f}", flush=True)
    run.seconds = time.perf_counter() - started
    return run


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and up to CURVE_WIDTH - 1 before it."""
    return [
        statistics.fmean(values[max(0, end - CURVE_WIDTH) : end])
        for end in range(1, len(values) + 1)
    ]


def draw(runs: Sequence[Run], last: int, title: str, path: str) -> None:
    """Writes the plot: loss curves above, each one's distance from fp32's below."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib: {error}") from None
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    reference = smooth(runs[0].losses)
    for run, style in zip(runs, ("-", "--", ":"), strict=True):
        curve = smooth(run.losses)
        steps = range(1, len(curve) + 1)
        label = f"{run.state_format}: {run.last(last):.4f} over the last {last} steps"
        above.plot(steps, curve, style, linewidth=1.6, label=label)
        percent = [100 * (c / r - 1) for c, r in zip(curve, reference, strict=True)]
        below.plot(steps, percent, style, linewidth=1.6)
    above.set_title(title)
    above.set_ylabel(f"loss, nats per byte\n(mean of {CURVE_WIDTH} steps)")
    above.legend()
    below.axhspan(-1, 1, color="0.9", zorder=0)
    below.set_ylabel("from float32, %\n(grey: 1%)")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def row_of(run: Run, reference: Run, last: int) -> Mapping[str, Any]:
    """One line of the table; the losses themselves are for the JSON."""
    return {
        "state_format": run.state_format,
        "first_loss": run.losses[0],
        "last_loss": run.last(last),
        "ratio_to_float32": run.last(last) / reference.last(last),
        "seconds": run.seconds,
    }


def main() -> int:
    """Returns 1 if a bar fails."""
    options = parse_arguments()
    config = PRESETS["tiny"]
    data = open_data(options.data, options.seed)
    runs = [train(state_format, config, data, options) for state_format in FORMATS]
    reference = runs[0]
    rows = [row_of(run, reference, options.last) for run in runs]
    print_rows(f"mean loss of the last {options.last} of {options.steps} steps", rows)
    if options.plot is not None:
        title = f"AdamW's state in three formats: GPT, {config.layers} layers of {config.width}"
        draw(runs, options.last, title, options.plot)
    bars = [
        Bar(
            f"final loss, {run.state_format} / float32",
            run.last(options.last) / reference.last(options.last),
            MOST_OVER_FP32,
        )
        for run in runs[1:]
    ]
    with_losses = [{**row, "losses": run.losses} for row, run in zip(rows, runs, strict=True)]
    return finish(options, tempfile.gettempdir(), with_losses, [] if options.quick else bars)


if __name__ == "__main__":
    sys.exit(main())
