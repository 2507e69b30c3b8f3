"""What the example prints: tables, a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memory_cap import format_size

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns under a title."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(flush=True)


class StepProgress:
    """One line of facts per step. rich is imported on a terminal only: it takes about 3 MB."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._every = -(-steps // 20)
        self._bar: Progress | None = None
        self._task = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[facts]}"),
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=steps, facts="")

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, facts: str) -> None:
        """Reports that `step` (from 1) is done. Off a terminal at most about 20 steps show."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts, refresh=True)
        elif step == 1 or step % self._every == 0 or step == self._steps:
            print(f"step {step:>{len(str(self._steps))}}/{self._steps}  {facts}", flush=True)


def print_summary(found: dict[str, Any]) -> None:
    """The end of a run, for a person."""
    cap = found["memory_cap_bytes"]
    rows = [
        ("steps", str(found["steps"])),
        ("peak memory (RSS)", format_size(found["peak_rss_bytes"])),
        ("memory cap", "none" if cap is None else format_size(cap)),
        ("training state", format_size(found["state_bytes"])),
    ]
    if found["steps"] > 0:
        rows += [
            ("first loss", repr(found["first_loss"])),
            ("last loss", repr(found["last_loss"])),
            ("median step", f"{statistics.median(found['step_seconds']):.2f} s"),
            ("tokens per second", f"{found['tokens_per_s']:.1f}"),
        ]
    if found["offload"]:
        rows += [
            ("read from disk", format_size(found["disk_read_bytes"])),
            ("written to disk", format_size(found["disk_write_bytes"])),
            ("waited for disk", f"{100 * found['stall_fraction']:.1f} % of the time"),
        ]
    if "weights_sha256" in found:
        rows.append(("weights, SHA-256", found["weights_sha256"]))
    print_table("summary", rows)
