"""The swap store under load: reads, writes, and the optimizer pipeline's mix of both.

Objects of a block fill the store; four of them are a unit: parameters, gradients, two moments.
Transfers go through whole objects in turn, one for each buffer at a time: as many as the queue is
deep are in flight, the others wait behind them. They are reads, writes, or the mix, which is the
four reads and three writes of unit after unit. A measurement starts at an object that the request
names.

The peers measure on this store's file, in the meantime: two files of one disk differ, by a few
percent and for as long as they are there. What they write is what every object holds anyway, so the
checksums still hold.

With "update", the mix is what it is for: a real optimizer update of each unit by the pipeline,
which waits for arithmetic too. It changes bytes, so it has a store of its own.
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

from io_peers.measurement import MIB, PATTERN, Measurement, Meter, Progress
from offload import _native
from offload.optim.aten_rounding import aten_rounding

JOBS = 16
STAGING_BLOCKS = 32
UNIT = 4  # objects: a parameter, its gradient, two moments
Start = Callable[[_native.Lease, int], _native.Transfer]


def open_store(folder: str) -> _native.SwapStore:
    """The store as it is in use: checksums on, the engine its own choice."""
    return _native.SwapStore(folder)


def pattern(nbytes: int) -> torch.Tensor:
    """What every object holds, as bytes."""
    return torch.frombuffer(bytearray(PATTERN), dtype=torch.uint8).repeat(nbytes // len(PATTERN))


def random_floats(nbytes: int) -> Iterator[torch.Tensor]:
    """Operands of updates, as bytes."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(nbytes // 4, generator=generator).view(torch.uint8)


class StoreLoad:
    """A store full of written objects, and one that is updated; measure() loads them."""

    def __init__(self, folder: str, size: int, buffers: int) -> None:
        self.folder = Path(folder).resolve()
        self.store = open_store(folder)
        if self.store.in_memory or not self.store.direct:
            raise SystemExit(f"{folder}: no O_DIRECT there: {self.store.note}")
        self.file = self._file()
        self.updated = open_store(folder)
        self.nbytes = self.store.block_bytes
        staging = STAGING_BLOCKS * self.nbytes
        self.arena = _native.HostArena(buffers + staging + MIB)
        for store in (self.store, self.updated):
            store.add_memory(self.arena)
        self.leases = [self.arena.allocate(self.nbytes) for _ in range(buffers // self.nbytes)]
        self.pipeline = _native.UpdatePipeline(self.updated, self.arena, staging, 1)
        count = size // self.nbytes // UNIT * UNIT
        self.operands = self._created(self.updated, count, staging)
        self._fill(self.updated, self.operands, random_floats(self.nbytes))
        # Last: what the buffers then hold is what measurements write.
        self.objects = self._created(self.store, count, buffers)
        self._fill(self.store, self.objects, itertools.repeat(pattern(self.nbytes)))
        self._unit = itertools.cycle(range(0, count, UNIT))

    def _created(self, store: _native.SwapStore, count: int, spare: int) -> list[int]:
        """`count` objects, not yet written."""
        store.reserve(count * store.footprint(self.nbytes), spare)
        return [store.create(self.nbytes) for _ in range(count)]

    def _fill(
        self, store: _native.SwapStore, objects: list[int], contents: Iterator[torch.Tensor]
    ) -> None:
        """Writes each object once, in the order of the file; all buffers hold such contents."""
        for lease, content in zip(self.leases, contents, strict=False):
            torch.frombuffer(lease, dtype=torch.uint8)[: self.nbytes].copy_(content)
        for item, lease in zip(objects, itertools.cycle(self.leases), strict=False):
            store.write(item, lease, self.nbytes).wait()

    def _file(self) -> str:
        """Path of the one unnamed swap file, for as long as this process lives."""
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = link.readlink()
            except FileNotFoundError:  # the descriptor that iterdir() itself used
                continue
            if target.is_relative_to(self.folder) and str(target).endswith("(deleted)"):
                return f"/proc/{os.getpid()}/fd/{link.name}"
        raise SystemExit(f"{self.folder}: the swap file has a name")

    def measure(self, request: Json) -> Measurement:
        """One measurement of request["workload"], from byte request["start"] on."""
        meter = Meter(request["seconds"], self._progress)
        if request.get("update", False):
            self._update_units(meter)
        else:
            first = request["start"] // self.nbytes % len(self.objects)
            objects = itertools.chain(self.objects[first:], itertools.cycle(self.objects))
            self._move_objects(meter, self._transfers(request["workload"], objects))
        if any(store.stats()["failed"] > 0 for store in (self.store, self.updated)):
            raise SystemExit("requests of the swap store failed")
        return meter.result()

    def close(self) -> None:
        """Ends the pipeline's threads and the store's."""
        self.pipeline.close()
        self.store.close()
        self.updated.close()

    def _progress(self) -> Progress:
        both = [store.stats() for store in (self.store, self.updated)]
        read, written = (sum(s[name] for s in both) for name in ("bytes_read", "bytes_written"))
        return Progress(read, written, self.pipeline.stats()["update_seconds"])

    def _transfers(self, workload: str, objects: Iterator[int]) -> Iterator[Start]:
        """What to start, one after the other, for ever; in the mix every read before its write."""
        read, write = self.store.read, self.store.write
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
            for item in self.operands[first : first + UNIT]
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
        "file": load.file,
    }

    return about, lambda request: asdict(load.measure(request)), load.close


if __name__ == "__main__":
    serve(_prepare)
