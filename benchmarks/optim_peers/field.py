"""The contestants of one comparison: their processes, their turns, what was found."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Bar, deepspeed_python, in_turn
from worker import Json, Worker

Turn = Callable[[], Json]
SKIPPED = "not installed: skipped"


@dataclass
class Contestant:
    """Who is measured; each turn's answer has at least `seconds`, of one step."""

    name: str
    turn: Turn
    settings: str = ""
    found: list[Json] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each turn so far."""
        return [found["seconds"] for found in self.found]

    def median(self, key: str = "seconds") -> float:
        """Over the turns so far."""
        return float(statistics.median(found[key] for found in self.found))


class Field(ExitStack):
    """A context manager: the processes and the folder of a comparison end with it."""

    def __init__(self, options: argparse.Namespace, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.options = options
        self.shapes = shapes
        self.numel = sum(math.prod(shape) for shape in shapes)
        self.deepspeed = deepspeed_python(options.peer_venv)
        self._folder = ""

    def __enter__(self) -> Field:
        super().__enter__()
        self._folder = self.enter_context(
            tempfile.TemporaryDirectory(prefix="offload-optim-", dir=self.options.swap_dir)
        )
        return self

    def folder(self, name: str) -> str:
        """A new folder on the disk that is measured."""
        return tempfile.mkdtemp(prefix=f"{name}-", dir=self._folder)

    def start(
        self,
        module: str,
        settings: Json,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> Worker:
        """A process of the package's `module`, which ends with the field unless it is ended."""
        everyone = {"shapes": self.shapes, "numel": self.numel, "threads": self.options.threads}
        log = Path(tempfile.mkstemp(prefix=f"{module}-", suffix=".log", dir=self._folder)[1])
        threads = {"OMP_NUM_THREADS": str(self.options.threads)}
        worker = Worker(
            python,
            f"optim_peers.{module}",
            log,
            {**everyone, **settings},
            {**threads, **(env or {})},
            before,
        )
        return self.enter_context(worker)


def take_turns(contestants: Sequence[Contestant], rounds: int) -> None:
    """Has everyone measured `rounds` times, in the order of in_turn()."""
    for number in range(rounds):
        for contestant in in_turn(contestants, number):
            contestant.found.append(contestant.turn())


def rows_of_rounds(comparison: str, contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """One row per round: everyone's milliseconds."""
    return [
        {"comparison": comparison, "round": number}
        | {f"{c.name}_ms": seconds * 1e3 for c, seconds in zip(contestants, turns, strict=True)}
        for number, turns in enumerate(zip(*(c.seconds for c in contestants), strict=True), start=1)
    ]


def ratio_bar(
    name: str,
    numerator: Sequence[float],
    denominator: Sequence[float],
    target: float,
    at_least: bool,
) -> Bar:
    """The median over the rounds of a ratio within each, its spread in the bar's name."""
    ratios = [n / d for n, d in zip(numerator, denominator, strict=True)]
    spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
    title = f"{name}, median of {len(ratios)} ({spread})"
    return Bar(title, statistics.median(ratios), target, at_least)


def median_steps(worker: Worker, request: Json) -> Turn:
    """A turn of three steps in a row: the median one counts."""

    def turn() -> Json:
        return {"seconds": statistics.median(worker.ask({**request, "steps": 3})["seconds"])}

    return turn


def fastest(worker: Worker, settings: Sequence[Json], quick: bool) -> Json:
    """Tries each twice and returns the one that was once the fastest; with --quick, the first."""
    if quick:
        worker.ask(settings[0])
        return settings[0]
    tried = [(worker.ask(s)["seconds"], n) for n in range(2) for n, s in enumerate(settings)]
    return settings[min(tried)[1]]
