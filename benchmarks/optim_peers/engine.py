"""Raw I/O of the swap store: as many bytes read and written as a step moves, and no update.

Objects of one size are read and written through as many leases, each transfer started when the
oldest one is done. What the disk does best with (how large, how many, reads and writes mixed or in
turns) is for the caller to find out.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator

from worker import Answer, Json, serve

from offload import _native

MIB = 2**20
SETTINGS = [
    {"object_bytes": size * MIB, "in_flight": in_flight * MIB, "in_turns": in_turns}
    for size, in_flight, in_turns in itertools.product((1, 4), (16, 64), (False, True))
]
TURNS_OF = 32 * MIB
MOST_IN_FLIGHT = 64 * MIB


def described(setting: Json) -> str:
    """One of SETTINGS, for people."""
    size, in_flight = setting["object_bytes"] // MIB, setting["in_flight"] // MIB
    turns = "in turns" if setting["in_turns"] else "mixed"
    return f"{size} MiB, {in_flight} MiB in flight, {turns}"


class _Load:
    """A store of objects that were all written; move() reads some of them and writes others."""

    def __init__(self, folder: str, object_bytes: int, in_turns: bool, span: int) -> None:
        self._nbytes = object_bytes
        self._store = _native.SwapStore([folder], phase_bytes=[TURNS_OF if in_turns else 0])
        self._arena = _native.HostArena(MOST_IN_FLIGHT)
        self._store.add_memory(self._arena)
        self._leases = [
            self._arena.allocate(object_bytes) for _ in range(MOST_IN_FLIGHT // object_bytes)
        ]
        count = max(4, span // object_bytes)
        footprint = self._store.footprint(object_bytes)
        self._store.reserve(count * footprint, 2 * len(self._leases) * footprint)
        self._objects = [self._store.create(object_bytes) for _ in range(count)]
        self._next = itertools.cycle(self._objects)
        for item, lease in zip(self._objects, itertools.cycle(self._leases)):
            self._store.write(item, lease, object_bytes).wait()

    def move(self, read: int, written: int, in_flight: int) -> float:
        """Seconds that `read` and `written` bytes take, `in_flight` bytes at a time."""
        reads, writes = (max(1, round(n / self._nbytes)) if n else 0 for n in (read, written))
        free = deque(self._leases[: max(2, in_flight // self._nbytes)])
        running: deque[tuple[_native.Lease, _native.Transfer]] = deque()
        started = time.perf_counter()
        for reading in mixed(reads, writes):
            if not free:
                lease, oldest = running.popleft()
                oldest.wait()
                free.append(lease)
            lease = free.popleft()
            transfer = self._store.read if reading else self._store.write
            running.append((lease, transfer(next(self._next), lease, self._nbytes)))
        for _, last in running:
            last.wait()
        seconds = time.perf_counter() - started
        return seconds * (read + written) / ((reads + writes) * self._nbytes)

    def close(self) -> None:
        """Ends the store's threads."""
        self._store.close()


def mixed(reads: int, writes: int) -> Iterator[bool]:
    """`reads` times True and `writes` times False, evenly mixed."""
    done = 0
    for number in range(1, reads + writes + 1):
        reading = done * (reads + writes) < reads * number
        done += reading
        yield reading


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    loads: dict[tuple[int, bool], _Load] = {}

    def answer(request: Json) -> Json:
        key = (request["object_bytes"], request["in_turns"])
        if key not in loads:
            loads[key] = _Load(settings["folder"], *key, settings["span"])
        seconds = loads[key].move(request["read"], request["written"], request["in_flight"])
        return {"seconds": seconds}

    def close() -> None:
        for load in loads.values():
            load.close()

    return {}, answer, close


if __name__ == "__main__":
    serve(_prepare)
