"""The swap store under load: reads, writes, and the optimizer pipeline's mix of both.

Objects of a block fill the store; four of them are a unit: parameters, gradients, two moments.
Transfers go through whole objects in turn, one for each buffer at a time: as many as the queue is
deep are in flight, the others wait behind them. They are reads, writes, or the mix, which is the
four reads and three writes of unit after unit. With "update", the mix is what it is for: a real
optimizer update of each unit by the pipeline, which waits for arithmetic too. A measurement goes on
where the last one ended.

The peers get a second store's file, filled likewise, so that what they write is nobody's objects.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from worker import Answer, Json, serve

from io_peers.measurement import MIB, Measurement, Meter, Progress
from offload import _native
from offload.optim.aten_rounding import aten_rounding

JOBS = 16
STAGING_BLOCKS = 32
Start = Callable[[_native.Lease, int], _native.Transfer]


def open_store(folder: str) -> _native.SwapStore:
    """The store as it is in use: checksums on, the engine its own choice."""
    return _native.SwapStore(folder)


class StoreLoad:
    """A store full of written objects; measure() loads it."""

    def __init__(self, folder: str, size: int, buffers: int) -> None:
        self.folder = Path(folder).resolve()
        self.store = open_store(folder)
        if self.store.in_memory or not self.store.direct:
            raise SystemExit(f"{folder}: no O_DIRECT there: {self.store.note}")
        self.nbytes = self.store.block_bytes
        staging = STAGING_BLOCKS * self.nbytes
        self.arena = _native.HostArena(buffers + staging + MIB)
        self.store.add_memory(self.arena)
        self.leases = [self.arena.allocate(self.nbytes) for _ in range(buffers // self.nbytes)]
        self.spare = max(buffers, staging)
        self.pipeline = _native.UpdatePipeline(self.store, self.arena, staging, 1)
        generator = torch.Generator().manual_seed(0)
        for lease in self.leases:
            torch.rand(
                self.nbytes // 4,
                generator=generator,
                out=torch.frombuffer(lease, dtype=torch.float32)[: self.nbytes // 4],
            )
        mine = self._files()
        self.peers_store = open_store(folder)
        self.peers_file = next(iter(self._files() - mine))
        self.objects, others = (self._created(s, size) for s in (self.store, self.peers_store))
        self._turn = itertools.cycle(self.objects)
        self._unit = itertools.cycle(range(0, len(self.objects), 4))
        # In turns, so that a host still has as much of the one file as of the other.
        for number, (item, other) in enumerate(zip(self.objects, others, strict=True)):
            lease = self.leases[number % len(self.leases)]
            self.store.write(item, lease, self.nbytes).wait()
            self.peers_store.write(other, lease, self.nbytes).wait()

    def _created(self, store: _native.SwapStore, size: int) -> list[int]:
        """`size` bytes of objects, not yet written."""
        count = size // self.nbytes // 4 * 4
        store.reserve(count * store.footprint(self.nbytes), self.spare)
        return [store.create(self.nbytes) for _ in range(count)]

    def _files(self) -> set[str]:
        """Paths of the unnamed swap files, for as long as this process lives."""
        found = set()
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = link.readlink()
            except FileNotFoundError:  # the descriptor that iterdir() itself used
                continue
            if target.is_relative_to(self.folder) and str(target).endswith("(deleted)"):
                found.add(f"/proc/{os.getpid()}/fd/{link.name}")
        if not found:
            raise SystemExit(f"{self.folder}: the swap file has a name")
        return found

    def measure(self, request: Json) -> Measurement:
        """One measurement of request["workload"]."""
        meter = Meter(request["seconds"], self._progress)
        if request.get("update", False):
            self._update_units(meter)
        else:
            self._move_objects(meter, self._transfers(request["workload"]))
        if self.store.stats()["failed"] > 0:
            raise SystemExit("requests of the swap store failed")
        return meter.result()

    def close(self) -> None:
        """Ends the pipeline's threads and the store's."""
        self.pipeline.close()
        self.store.close()
        self.peers_store.close()

    def _progress(self) -> Progress:
        stats = self.store.stats()
        computing = self.pipeline.stats()["update_seconds"]
        return Progress(stats["bytes_read"], stats["bytes_written"], computing)

    def _transfers(self, workload: str) -> Iterator[Start]:
        """What to start, one after the other, for ever; in the mix every read before its write."""
        read, write = self.store.read, self.store.write
        objects = self._turn
        if workload != "mix":
            transfer = read if workload == "read" else write
            return (partial(transfer, item) for item in objects)
        units = zip(objects, objects, objects, objects, strict=True)
        following, leading = itertools.tee(units)
        next(leading)
        return (
            start
            for (_, *changed), (param, *others) in zip(following, leading, strict=True)
            for start in (
                partial(read, param),
                *itertools.chain.from_iterable(
                    (partial(write, old), partial(read, new))
                    for old, new in zip(changed, others, strict=True)
                ),
            )
        )

    def _move_objects(self, meter: Meter, transfers: Iterator[Start]) -> None:
        in_flight = deque((lease, next(transfers)(lease, self.nbytes)) for lease in self.leases)
        running = True
        while in_flight:
            lease, oldest = in_flight.popleft()
            oldest.wait()
            running = running and meter.running()
            if running:
                in_flight.append((lease, next(transfers)(lease, self.nbytes)))

    def _update_units(self, meter: Meter) -> None:
        in_flight = deque(self._submit_unit(next(self._unit)) for _ in range(JOBS))
        running = True
        while in_flight:
            in_flight.popleft().wait()
            running = running and meter.running()
            if running:
                in_flight.append(self._submit_unit(next(self._unit)))

    def _submit_unit(self, first: int) -> _native.Transfer:
        hyper = _native.UpdateHyper(
            "adamw", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, step=10.0, rounding=aten_rounding()
        )
        param, grad, *states = (
            _native.UpdateOperand.on_disk(item, self.nbytes)
            for item in self.objects[first : first + 4]
        )
        numel = self.nbytes // 4
        segments = [_native.UpdateSegment(0, numel, hyper, [])]
        return self.pipeline.submit(
            numel, _native.UpdateFormat(), 0, param, grad, None, states, [], segments
        )


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    load = StoreLoad(settings["folder"], settings["size"], settings["buffers"])
    about = {
        "config": f"{load.store.engine}, checksums",
        "why": load.store.engine_reason,
        "file": load.peers_file,
    }

    return about, lambda request: asdict(load.measure(request)), load.close


if __name__ == "__main__":
    serve(_prepare)
