"""One measurement: bytes and CPU time between two moments while a load is running."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MIB = 2**20
WORKLOADS = ("read", "write", "mix")
RAMP_SECONDS = 0.3
STRIDE = 64 * MIB  # measurements start at multiples of it
# The file that all share holds this throughout, and all write it: so what one contestant wrote has
# the checksums that the store knows. fio repeats at most 512 bytes.
PATTERN = random.Random(0).randbytes(512)


@dataclass(frozen=True)
class Measurement:
    """Bytes moved in `seconds`, and the CPU seconds of the process that moved them.

    `compute_seconds` is the part of the CPU time that went into arithmetic rather than transfers.
    Work that the kernel does in threads of its own is in nobody's CPU time.
    """

    seconds: float
    read_bytes: float
    written_bytes: float
    user_seconds: float
    system_seconds: float
    compute_seconds: float = 0.0

    @property
    def nbytes(self) -> float:
        """Bytes read and written."""
        return self.read_bytes + self.written_bytes

    @property
    def nbytes_with_ramp(self) -> float:
        """Bytes of the measurement and, about, of the ramp before it."""
        return self.nbytes * (1 + RAMP_SECONDS / self.seconds)

    @property
    def rate(self) -> float:
        """Bytes per second, reads and writes together."""
        return self.nbytes / self.seconds

    @property
    def cpu_per_byte(self) -> float:
        """CPU seconds per byte without the arithmetic."""
        return (self.user_seconds + self.system_seconds - self.compute_seconds) / self.nbytes


class Cursor:
    """Where in the file everybody's next measurement starts: behind what the last ones moved.

    So a round reads what was moved long ago, and a host's cache may hold only what others of the
    same round have just moved; the order of the turns evens that out.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.position = 0  # bytes; a multiple of STRIDE

    def move(self, found: Iterable[Measurement]) -> None:
        """To behind what any of these and its ramp moved; past the file's middle, begin again."""
        moved = max(one.nbytes_with_ramp for one in found)
        self.position += -(-int(moved) // STRIDE) * STRIDE
        if self.position > self._size // 2:  # too little may be left for a measurement
            self.position = 0


@dataclass(frozen=True)
class Progress:
    """What a load has done since it was started."""

    read_bytes: float
    written_bytes: float
    compute_seconds: float = 0.0


class Meter:
    """Measures the calling process from the end of a ramp until `seconds` later.

    The load calls running() whenever something was finished and stops when it returns False. Both
    ends of the measurement thus lie at such a moment, with as much in flight at the one as at the
    other.
    """

    def __init__(self, seconds: float, progress: Callable[[], Progress]) -> None:
        self._seconds = seconds
        self._progress = progress
        self._created = time.perf_counter()
        self._begin: tuple[float, Progress, resource.struct_rusage] | None = None
        self._end: tuple[float, Progress, resource.struct_rusage] | None = None

    def running(self) -> bool:
        """Whether the load is to go on."""
        now = time.perf_counter()
        if self._begin is None:
            if now - self._created >= RAMP_SECONDS:
                self._begin = self._now()
            return True
        if now - self._begin[0] < self._seconds:
            return True
        self._end = self._now()
        return False

    def result(self) -> Measurement:
        """What was measured; raises RuntimeError while the load is running."""
        if self._begin is None or self._end is None:
            raise RuntimeError("the load ended before its measurement did")
        started, before, used_before = self._begin
        ended, after, used_after = self._end
        return Measurement(
            ended - started,
            after.read_bytes - before.read_bytes,
            after.written_bytes - before.written_bytes,
            used_after.ru_utime - used_before.ru_utime,
            used_after.ru_stime - used_before.ru_stime,
            after.compute_seconds - before.compute_seconds,
        )

    def _now(self) -> tuple[float, Progress, resource.struct_rusage]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), self._progress(), usage
