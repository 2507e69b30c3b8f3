"""UpdatePipeline and Transfer.wait as Python sees them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch

from offload import BudgetError, OffloadError, _native
from offload.optim.aten_rounding import aten_rounding

MIB = 2**20
BLOCK = _native.SwapStore.default_block_bytes


def hyper(step: float = 1.0) -> _native.AdamWHyper:
    return _native.AdamWHyper(1e-3, 0.9, 0.999, 1e-8, 0.1, step, False, aten_rounding())


def floats(lease: _native.Lease) -> torch.Tensor:
    return torch.frombuffer(lease, dtype=torch.float32)


class Unit:
    """Four operands in memory."""

    def __init__(self, arena: _native.HostArena, numel: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.numel = numel
        self.leases = [arena.allocate(4 * numel) for _ in range(4)]
        self.values = [floats(lease)[:numel] for lease in self.leases]
        for value in self.values[:2]:
            value.copy_(torch.randn(numel, generator=generator))
        for value in self.values[2:]:
            value.zero_()

    def operands(self) -> list[_native.UpdateOperand]:
        return [_native.UpdateOperand.in_memory(lease, 4 * self.numel) for lease in self.leases]

    def expected(self, factors: list[float]) -> list[torch.Tensor]:
        copies = [value.clone() for value in self.values]
        param, grad, exp_avg, exp_avg_sq = (copy.data_ptr() for copy in copies)
        _native.adamw_update(
            hyper(), factors, param, grad, exp_avg, exp_avg_sq, self.numel, _native.best_isa()
        )
        return copies


def submit(
    pipeline: _native.UpdatePipeline,
    numel: int,
    operands: list[_native.UpdateOperand],
    factors: list[float],
) -> _native.Transfer:
    segment = _native.UpdateSegment(0, numel, hyper(), factors)
    param, grad, exp_avg, exp_avg_sq = operands
    return pipeline.submit(numel, param, grad, exp_avg, exp_avg_sq, [segment])


@pytest.mark.parametrize("numel", [1, 1000, BLOCK // 4 + 3])
@pytest.mark.parametrize("factors", [[], [0.5, 0.3]], ids=["plain", "factors"])
def test_in_memory(numel: int, factors: list[float]) -> None:
    arena = _native.HostArena(16 * MIB)
    unit = Unit(arena, numel, seed=1)
    factors = torch.tensor(factors).tolist()
    expected = unit.expected(factors)
    pipeline = _native.UpdatePipeline(None, arena, staging_sets=0, threads=2)
    submit(pipeline, numel, unit.operands(), factors).wait()
    assert all(torch.equal(a, b) for a, b in zip(unit.values, expected, strict=True))
    assert pipeline.stats()["jobs"] == 1
    assert pipeline.stats()["update_seconds"] > 0
    pipeline.close()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_on_disk(engine: str, tmp_path: Path) -> None:
    try:
        store = _native.SwapStore(str(tmp_path), engine)
    except OffloadError as error:
        pytest.skip(f"{engine} is not offered here: {error}")
    arena, numel = _native.HostArena(32 * MIB), BLOCK // 4 + 3
    store.reserve(4 * store.footprint(4 * numel), 16 * MIB)
    unit = Unit(arena, numel, seed=2)
    expected = unit.expected([])
    things = [store.create(4 * numel) for _ in range(4)]
    for thing, lease in zip(things[:2], unit.leases[:2], strict=True):
        store.write(thing, lease, 4 * numel).wait()  # the moments were never written: zero
    pipeline = _native.UpdatePipeline(store, arena, staging_sets=2, threads=1)
    operands = [_native.UpdateOperand.on_disk(thing, 4 * numel) for thing in things]
    submit(pipeline, numel, operands, []).wait()
    for thing, lease, value in zip(things, unit.leases, expected, strict=True):
        store.read(thing, lease, 4 * numel).wait()
        assert torch.equal(floats(lease)[:numel], value)
    pipeline.close()


def test_staging_counts_against_the_arena() -> None:
    arena = _native.HostArena(8 * MIB)
    pipeline = _native.UpdatePipeline(None, arena, staging_sets=1, threads=1)
    assert arena.usage()["in_use"] == _native.UpdatePipeline.staging_set_bytes()
    with pytest.raises(BudgetError):
        _native.UpdatePipeline(None, arena, staging_sets=2, threads=1)
    pipeline.close()


def test_segments_that_do_not_fit() -> None:
    arena = _native.HostArena(MIB)
    unit = Unit(arena, 100, seed=3)
    pipeline = _native.UpdatePipeline(None, arena, staging_sets=0, threads=1)
    before = [value.clone() for value in unit.values]
    param, grad, exp_avg, exp_avg_sq = unit.operands()
    for ranges in ([(0, 101)], [(50, 60), (0, 10)], [(0, 10), (9, 20)]):
        segments = [_native.UpdateSegment(a, b, hyper(), []) for a, b in ranges]
        with pytest.raises(OffloadError):
            pipeline.submit(100, param, grad, exp_avg, exp_avg_sq, segments)
    assert all(torch.equal(a, b) for a, b in zip(unit.values, before, strict=True))
    pipeline.close()
    with pytest.raises(OffloadError):
        submit(pipeline, 100, unit.operands(), [])


class Busy:
    """A pipeline with enough in-memory jobs for about `seconds`; all run on one native thread."""

    def __init__(self, seconds: float) -> None:
        arena = _native.HostArena(20 * MIB)
        unit = Unit(arena, MIB, seed=4)
        self.pipeline = _native.UpdatePipeline(None, arena, staging_sets=0, threads=1)
        fastest = math.inf
        for _ in range(4):
            start = time.perf_counter()
            submit(self.pipeline, MIB, unit.operands(), []).wait()
            fastest = min(fastest, time.perf_counter() - start)
        for _ in range(int(seconds / fastest)):
            self.last = submit(self.pipeline, MIB, unit.operands(), [])


@pytest.fixture
def busy() -> Iterator[Busy]:
    made = Busy(0.5)
    yield made
    made.pipeline.close()


def test_wait_lets_other_threads_run(busy: Busy) -> None:
    stamps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    busy.last.wait()
    end = time.perf_counter()
    stop.set()
    ticker.join()
    assert end - start > 0.05, "the transfer was too short to see anything"
    # In three separate quarters: a thread that only ran before or after the call is not in all.
    quarter = (end - start) / 4
    for k in range(1, 4):
        middle = [
            s for s in stamps if start + (k - 0.5) * quarter < s < start + (k + 0.5) * quarter
        ]
        assert middle, f"no other thread ran in quarter {k} of wait()"


def test_wait_is_interruptible_and_can_be_resumed(busy: Busy) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            busy.last.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    busy.last.wait()
    assert busy.last.done()
