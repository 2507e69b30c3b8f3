"""What wrapping costs when nothing has to move: steps of a wrapped model against a plain one.

The budget holds everything, so no byte goes to disk: what is left is hooks, gradients copied to
their slabs, and the bookkeeping of the step. The two models take turns, step by step, with the same
optimizer, `offload.AdamW`; a ratio is of two neighbouring steps.

    python benchmarks/hook_overhead.py            # about 3 minutes
    python benchmarks/hook_overhead.py --only tiny --threads 1

The demo is the GPT of examples/, one sequence of 256 tokens; "tiny" has 200 blocks of a LayerNorm
and a Linear of width 64, with 256 rows: a step of it is mostly torch's own time per operation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Bar, add_common_options, finish, print_rows
from torch import nn

import offload

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from gpt import GPT, PRESETS

MOST = {"demo": 1.03, "tiny": 1.10}
SLACK = 1.25
"""Of the training state: the budget holds it whole, with what the runtime needs beside it."""


class Tiny(nn.Module):
    """200 residual blocks of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(200)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 64) to the same shape."""
        for block in self.blocks:
            x = x + block(x)
        return x


def demo(quick: bool) -> tuple[Callable[[], nn.Module], torch.Tensor]:
    """The demo's model and a batch of bytes."""
    config = PRESETS["tiny" if quick else "124m"]
    tokens = torch.randint(0, config.vocabulary, (1, 128 if quick else 256))
    return lambda: GPT(config), tokens


def tiny(quick: bool) -> tuple[Callable[[], nn.Module], torch.Tensor]:
    """Many small layers, and a batch."""
    return Tiny, torch.randn(256, 64)


def compare(
    make: Callable[[], nn.Module], batch: torch.Tensor, rounds: int
) -> list[tuple[float, float]]:
    """Seconds of a (plain, wrapped) step, for each round."""
    steps = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = make()
        if wrapped:
            state = sum(p.numel() for p in model.parameters()) * 16
            budget = offload.Budget(host=int(state * SLACK) + (16 << 20))
            model = offload.wrap(model, offload.Policy(budget=budget))
        steps.append(_stepper(model, batch))
    for step in steps:  # memory is touched, the order of units is learnt
        step()
        step()
    return [(steps[0](), steps[1]()) for _ in range(rounds)]


def _stepper(model: nn.Module, batch: torch.Tensor) -> Callable[[], float]:
    optimizer = offload.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        begun = time.perf_counter()
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    return step


def main() -> int:
    """Returns 1 if a bar fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument("--only", choices=MOST)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    bars = []
    for name in MOST if options.only is None else (options.only,):
        make, batch = (demo if name == "demo" else tiny)(options.quick)
        turns = compare(make, batch, rounds)
        ratios = [wrapped / plain for plain, wrapped in turns]
        rows.append(
            {
                "model": name,
                "threads": options.threads,
                "plain_ms": statistics.median(plain for plain, _ in turns) * 1e3,
                "wrapped_ms": statistics.median(wrapped for _, wrapped in turns) * 1e3,
                "ratio": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
        )
        bars.append(Bar(f"{name}, wrapped / plain", rows[-1]["ratio"], MOST[name]))
    print_rows(f"everything in memory, medians of {rounds} rounds", rows)
    return finish(options, tempfile.gettempdir(), rows, [] if options.quick else bars)


if __name__ == "__main__":
    sys.exit(main())
