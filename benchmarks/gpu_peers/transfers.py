"""Copies between host and device: those of the core, and torch's from pinned memory, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from worker import Answer, Json, serve

from offload import _native

COPIES = 4


class Transfers:
    """Several slabs in host memory and as many places on the device."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.on_cuda = device == "cuda"
        room = COPIES * nbytes
        if self.on_cuda:
            self.device = _native.cuda_device(0)
        else:
            self.device = _native.simulated_device(room, check=False)
        arena = _native.DeviceArena(self.device, room)
        host = _native.HostArena(room, pin=self.device)
        self.transfers = _native.DeviceTransfers(self.device)
        self.places = [arena.allocate(nbytes) for _ in range(COPIES)]
        self.slabs = [host.allocate(nbytes) for _ in range(COPIES)]
        self.pinned = [self._pinned() for _ in range(COPIES)]
        where = "cuda:0" if self.on_cuda else "cpu"
        self.tensors = [torch.empty(nbytes, dtype=torch.uint8, device=where) for _ in self.places]
        make_stream: Any = torch.cuda.Stream
        self.stream = make_stream(0) if self.on_cuda else None

    def _pinned(self) -> torch.Tensor:
        return torch.ones(self.nbytes, dtype=torch.uint8, pin_memory=self.on_cuda)

    def ours(self, to_device: bool) -> float:
        """Bytes per second of the core's transfers."""
        started = time.perf_counter()
        pairs = zip(self.places, self.slabs, strict=True)
        if to_device:
            flying = [self.transfers.fetch(place, slab, self.nbytes) for place, slab in pairs]
        else:
            flying = [self.transfers.spill(place, slab, self.nbytes) for place, slab in pairs]
        for transfer in flying:
            transfer.wait()
        return COPIES * self.nbytes / (time.perf_counter() - started)

    def pinned_copies(self, to_device: bool) -> float:
        """Bytes per second of cudaMemcpyAsync from and to pinned memory, as torch submits it."""
        started = time.perf_counter()
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for tensor, pinned in zip(self.tensors, self.pinned, strict=True):
                target, source = (tensor, pinned) if to_device else (pinned, tensor)
                target.copy_(source, non_blocking=True)
        if self.stream is not None:
            self.stream.synchronize()
        return COPIES * self.nbytes / (time.perf_counter() - started)


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    transfers = Transfers(settings["device"], settings["nbytes"])

    def answer(request: Json) -> Json:
        """One turn of each, in the direction that is asked for."""
        to_device = request["direction"] == "h2d"
        turns = [("ours", transfers.ours), ("pinned", transfers.pinned_copies)]
        if request["round"] % 2:
            turns.reverse()
        return {name: turn(to_device) for name, turn in turns}

    return {}, answer, lambda: None


if __name__ == "__main__":
    serve(_prepare)
