"""DeepSpeed's async_io handle under the same load and on the same file, as its swapper drives it.

Runs in the Python that DeepSpeed is installed in. Groups of four tensors, of a size that the
request names, move through pinned buffers of the handle. Reads or writes alone go through one
handle, or through two in turn, so that one works while the other is waited for. The mix is
PipelinedOptimizerSwapper's: one handle reads the next unit's four tensors while another writes
three of the previous one's.
"""

from __future__ import annotations

import importlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from worker import Answer, Json, serve

from io_peers.measurement import MIB, PATTERN, STRIDE, Measurement, Meter, Progress

LARGEST = STRIDE
GROUP = 4
SETS = 3
WRITTEN = 3


class AioLoad:
    """DeepSpeed on the first `size` bytes of `file`, which hold PATTERN."""

    def __init__(self, file: str, size: int) -> None:
        builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
        self._aio = builder.load(verbose=False)
        self._path = file
        self._size = size
        self._handles: dict[tuple[bool, int], list[Any]] = {}
        self._read = 0
        self._written = 0
        self._position = 0  # bytes
        first = self._pair(True, 1)[0]
        self._buffers = [
            [first.new_cpu_locked_tensor(LARGEST // 4, torch.empty(0)) for _ in range(GROUP)]
            for _ in range(SETS)
        ]
        self._use(LARGEST)
        pattern = torch.frombuffer(bytearray(PATTERN), dtype=torch.int32)
        bits = [[tensor.view(torch.int32) for tensor in group] for group in self._sets]
        for tensor in itertools.chain.from_iterable(bits):
            tensor.view(-1, pattern.numel()).copy_(pattern)
        for tensor in bits[1]:
            tensor.zero_()  # is read into
        for transfer, tensors in zip(
            (first.async_pwrite, first.async_pread), self._sets, strict=False
        ):
            self._start(transfer, tensors, 0)
            self._wait(first, GROUP)
        if not all(map(torch.equal, bits[0], bits[1])):
            raise SystemExit("DeepSpeed read other bytes than it wrote")

    def _use(self, nbytes: int) -> None:
        """Moves tensors of `nbytes` from now on: the first bytes of each buffer."""
        self._nbytes = nbytes
        self._sets = [[buffer[: nbytes // 4] for buffer in group] for group in self._buffers]

    def measure(self, request: Json) -> Measurement:
        """One measurement of request["workload"], from byte request["start"], with its handles."""
        self._use(request["tensor_bytes"])
        self._position = request["start"]
        pair = self._pair(request["overlap_events"], request["intra_op_parallelism"])
        meter = Meter(request["seconds"], lambda: Progress(self._read, self._written))
        if request["workload"] == "mix":
            self._swap_units(meter, *pair)
        else:
            reading = request["workload"] == "read"
            self._move_groups(meter, reading, pair[: request["handles"]])
        return meter.result()

    def _pair(self, overlap_events: bool, threads: int) -> list[Any]:
        """Two handles: block size 1 MiB, queue depth 16, submitted in batches."""
        key = (overlap_events, threads)
        if key not in self._handles:
            self._handles[key] = [
                self._aio.aio_handle(MIB, 16, False, overlap_events, threads) for _ in range(2)
            ]
        return self._handles[key]

    def _start(
        self, transfer: Callable[..., int], tensors: Iterable[torch.Tensor], first: int
    ) -> None:
        for number, tensor in enumerate(tensors):
            place = (first + number * self._nbytes) % self._size
            if transfer(tensor, self._path, place) != 0:
                raise SystemExit("DeepSpeed refused a transfer")

    @staticmethod
    def _wait(handle: Any, count: int) -> None:
        if handle.wait() != count:
            raise SystemExit("DeepSpeed ended another number of transfers than were started")

    def _move_groups(self, meter: Meter, reading: bool, handles: list[Any]) -> None:
        in_flight: deque[tuple[Any, list[torch.Tensor]]] = deque()

        def start(handle: Any, tensors: list[torch.Tensor]) -> None:
            transfer = handle.async_pread if reading else handle.async_pwrite
            self._start(transfer, tensors, self._position)
            self._position += GROUP * self._nbytes
            in_flight.append((handle, tensors))

        for handle, tensors in zip(handles, self._sets, strict=False):
            start(handle, tensors)
        running = True
        while in_flight:
            handle, tensors = in_flight.popleft()
            self._wait(handle, GROUP)
            self._read += reading * GROUP * self._nbytes
            self._written += (not reading) * GROUP * self._nbytes
            running = running and meter.running()
            if running:
                start(handle, tensors)

    def _swap_units(self, meter: Meter, reader: Any, writer: Any) -> None:
        group = GROUP * self._nbytes
        self._start(reader.async_pread, self._sets[0], self._position)
        unit, writing, running = 0, False, True
        while running:
            self._wait(reader, GROUP)
            self._read += GROUP * self._nbytes
            self._start(reader.async_pread, self._sets[(unit + 1) % SETS], self._position + group)
            if writing:
                self._wait(writer, WRITTEN)
                self._written += WRITTEN * self._nbytes
            running = meter.running()
            self._start(writer.async_pwrite, self._sets[unit % SETS][:WRITTEN], self._position)
            self._position += group
            unit, writing = unit + 1, True
        self._wait(reader, GROUP)
        self._wait(writer, WRITTEN)


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    load = AioLoad(settings["file"], settings["size"])
    version = importlib.import_module("deepspeed").__version__
    return {"version": version}, lambda request: asdict(load.measure(request)), lambda: None


if __name__ == "__main__":
    serve(_prepare)
