"""AccessTrace: the recorded order of unit uses, and what it says comes next.

A use is (unit, phase). The trace keeps the recent history and a cursor into its past: the place
where the same uses happened before. What followed there is the prediction. Training loops repeat
themselves (per micro-batch and per step), so from the second pass on the future is known; where a
program leaves the record the cursor is looked up again, first by the last two uses, then by the
last one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

_PASSES = 64
"""Passes that are searched for the last one with a backward."""


class Phase(Enum):
    """In which half of a training step a unit is used."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Use:
    """One use of a unit: its index in the plan, and the phase."""

    unit: int
    phase: Phase


class AccessTrace:
    """Records uses and predicts the next ones. Not thread-safe: the owner serialises."""

    def __init__(self, capacity: int = 32768) -> None:
        """Keep at least `capacity` // 2 of the most recent uses."""
        self._capacity = capacity
        self._history: list[Use] = []
        self._cursor: int | None = None
        self._after_one: dict[Use, int] = {}
        self._after_two: dict[tuple[Use, Use], int] = {}
        self._pass_starts: list[int] = []
        self._passes = 0  # of this step so far
        self._passes_before: int | None = None  # of the step before
        self._step_ends = False
        self.recorded = 0
        self.mispredicted = 0

    def begin_pass(self) -> None:
        """The next use is the first of a pass: an outermost forward, and its backward if any."""
        if not self._pass_starts or self._pass_starts[-1] != len(self._history):
            self._pass_starts.append(len(self._history))
        if self._step_ends:
            self._passes_before, self._passes = self._passes, 0
            self._step_ends = False
        self._passes += 1

    def end_step(self) -> None:
        """An optimizer has begun updates: the next pass is of another step."""
        self._step_ends = True

    def last_training_pass(self) -> list[Use] | None:
        """Return the uses of the last whole pass that had a backward; None: there was none."""
        ends = [*self._pass_starts, len(self._history)][1:]
        for start, end in reversed(list(zip(self._pass_starts, ends, strict=True))[-_PASSES:]):
            uses = self._history[start:end]
            if uses and uses[0].phase is Phase.FORWARD and uses[-1].phase is Phase.BACKWARD:
                return uses
        return None

    def record(self, use: Use) -> None:
        """Append `use` and move the cursor to where it happened before."""
        history = self._history
        previous = history[-1] if history else None
        expected = self._expected()
        if expected is not None and history[expected] == use:
            cursor: int | None = expected
        else:
            if expected is not None:
                self.mispredicted += 1
            cursor = self._after_one.get(use)
            if previous is not None:
                cursor = self._after_two.get((previous, use), cursor)
        index = len(history)
        history.append(use)
        self.recorded += 1
        self._cursor = cursor
        self._after_one[use] = index
        if previous is not None:
            self._after_two[(previous, use)] = index
        if len(history) >= self._capacity:
            self._forget_older_half()

    @property
    def predicts(self) -> bool:
        """Whether future() yields anything."""
        return next(self.future(1), None) is not None

    def future(self, limit: int) -> Iterator[Use]:
        """Yield up to `limit` predicted uses, nearest first; none before anything repeated."""
        if self._cursor is None:
            return
        history = self._history
        first = self._cursor + 1
        period = len(history) - first
        if period <= 0:
            return
        for step in range(limit):
            yield history[first + step % period]

    def in_step(self, limit: int) -> int:
        """Return how many of the `limit` uses that future() yields come before the next step.

        It is taken to have as many passes as the step before; where there was none, it never ends.
        """
        if self._step_ends:  # what is coming is another step
            left = self._passes + 1
        elif self._passes_before is None:
            return limit
        else:
            left = max(1, self._passes_before - self._passes + 1)
        starts, end = self._pass_starts, len(self._history)
        first = end if self._cursor is None else self._cursor + 1
        earliest = bisect_left(starts, first)
        inside = [start - first for start in starts[earliest : earliest + left] if start < end]
        if not inside:
            return limit
        around, index = divmod(left - 1, len(inside))
        return min(limit, around * (end - first) + inside[index])

    def _expected(self) -> int | None:
        """Index in the history of the use that is predicted next."""
        if self._cursor is None:
            return None
        following = self._cursor + 1
        return following if following < len(self._history) else None

    def _forget_older_half(self) -> None:
        drop = len(self._history) // 2
        self._history = self._history[drop:]
        self._cursor = None if self._cursor is None or self._cursor < drop else self._cursor - drop
        self._pass_starts = [i - drop for i in self._pass_starts if i >= drop]
        self._after_one = {u: i - drop for u, i in self._after_one.items() if i >= drop}
        self._after_two = {u: i - drop for u, i in self._after_two.items() if i >= drop}
