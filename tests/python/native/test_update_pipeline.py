"""UpdatePipeline and Transfer.wait as Python sees them."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch

from offload import BudgetError, OffloadError, _native
from offload.optim.aten_rounding import aten_rounding

MIB = 2**20
BLOCK = _native.SwapStore.default_block_bytes
SEED = 11


def hyper(step: float = 1.0) -> _native.UpdateHyper:
    return _native.UpdateHyper(
        "adamw",
        lr=1e-3,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        step=step,
        rounding=aten_rounding(),
    )


FP32 = _native.UpdateFormat()
MIXED = _native.UpdateFormat("bfloat16", "int8")


def floats(lease: _native.Lease) -> torch.Tensor:
    return torch.frombuffer(lease, dtype=torch.float32)


class Values:
    """What the operands of a unit hold: tensors of the format's types."""

    def __init__(self, numel: int, seed: int, fmt: _native.UpdateFormat = FP32) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if fmt.has_master else torch.float32
        state = torch.uint8 if fmt.state_bytes == 1 else torch.float32
        self.numel, self.format = numel, fmt
        master = torch.randn(numel, generator=generator)
        self.param = master.to(dtype)
        self.grad = torch.randn(numel, generator=generator).to(dtype)
        self.master = master if fmt.has_master else None
        self.states = [torch.zeros(numel, dtype=state) for _ in range(2)]
        rows = 2 if fmt.state_bytes == 1 else 0
        self.scales = [torch.zeros(-(-numel // 256)) for _ in range(rows)]

    def tensors(self) -> list[torch.Tensor]:
        """All of them; the gradient is second."""
        master = [] if self.master is None else [self.master]
        return [self.param, self.grad, *master, *self.states, *self.scales]

    def equal(self, other: Values) -> bool:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def clone(self) -> Values:
        """A copy of it all."""
        new = copy.copy(self)
        new.param, new.grad = self.param.clone(), self.grad.clone()
        new.master = None if self.master is None else self.master.clone()
        new.states = [state.clone() for state in self.states]
        new.scales = [scale.clone() for scale in self.scales]
        return new

    def updated(self, factors: list[float]) -> Values:
        """The slow reference: one call on plain tensors."""
        after = self.clone()
        _native.update(
            hyper(),
            self.format,
            factors=factors,
            seed=SEED,
            parameter=7,
            first=0,
            param=after.param.data_ptr(),
            grad=after.grad.data_ptr(),
            master=0 if after.master is None else after.master.data_ptr(),
            states=[state.data_ptr() for state in after.states],
            scales=[scale.data_ptr() for scale in after.scales],
            n=self.numel,
            isa=_native.best_isa(),
        )
        return after


def borrowed(tensor: torch.Tensor, kept: object = None) -> _native.UpdateOperand:
    kept = tensor if kept is None else kept
    return _native.UpdateOperand.borrowed(tensor.data_ptr(), tensor.nbytes, kept)


def submit(
    pipeline: _native.UpdatePipeline,
    values: Values,
    operands: list[_native.UpdateOperand],
    factors: list[float],
) -> _native.Transfer:
    """The job of `values`, its operands in the order of Values.tensors()."""
    param, grad, *rest = operands
    master = rest.pop(0) if values.format.has_master else None
    segment = _native.UpdateSegment(0, values.numel, hyper(), factors, parameter=7)
    return pipeline.submit(
        values.numel, values.format, SEED, param, grad, master, rest[:2], rest[2:], [segment]
    )


def in_leases(
    arena: _native.HostArena, values: Values
) -> tuple[list[_native.UpdateOperand], list[torch.Tensor]]:
    """Operands in memory, and views of what they hold."""
    operands, views = [], []
    for tensor in values.tensors():
        lease = arena.allocate(tensor.nbytes)
        view = torch.frombuffer(lease, dtype=tensor.dtype, count=tensor.numel())
        view.copy_(tensor)
        operands.append(_native.UpdateOperand.in_memory(lease, tensor.nbytes))
        views.append(view)
    return operands, views


@pytest.mark.parametrize("fmt", [FP32, MIXED], ids=["fp32", "bf16-int8"])
@pytest.mark.parametrize("numel", [1, 1000, BLOCK // 4 + 3])
@pytest.mark.parametrize("factors", [[], [0.5, 0.3]], ids=["plain", "factors"])
def test_in_memory(fmt: _native.UpdateFormat, numel: int, factors: list[float]) -> None:
    values = Values(numel, 1, fmt)
    expected = values.updated(torch.tensor(factors).tolist())
    operands, views = in_leases(_native.HostArena(16 * MIB), values)
    pipeline = _native.UpdatePipeline(None, None, staging_bytes=0, threads=2)
    submit(pipeline, values, operands, factors).wait()
    assert all(torch.equal(a, b) for a, b in zip(views, expected.tensors(), strict=True))
    assert pipeline.stats()["jobs"] == 1
    assert pipeline.stats()["update_seconds"] > 0
    pipeline.close()


@pytest.fixture(params=["io_uring", "threads"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_native.SwapStore]:
    try:
        store = _native.SwapStore(str(tmp_path), request.param)
    except OffloadError as error:
        pytest.skip(f"{request.param} is not offered here: {error}")
    store.reserve(32 * MIB, 32 * MIB)
    yield store
    store.close()


@pytest.mark.parametrize("fmt", [FP32, MIXED], ids=["fp32", "bf16-int8"])
def test_on_disk(store: _native.SwapStore, fmt: _native.UpdateFormat) -> None:
    """All on disk but scales, which never are; what was never written has its first value."""
    arena = _native.HostArena(32 * MIB)
    values = Values(BLOCK // 4 + 3, 2, fmt)
    if values.master is not None:
        values.master.copy_(values.param)
    expected = values.updated([])
    staging = _native.UpdatePipeline.min_staging_bytes()
    pipeline = _native.UpdatePipeline(store, arena, staging, threads=1)
    operands, things = [], []
    for i, tensor in enumerate(values.tensors()):
        if any(tensor is scale for scale in values.scales):
            operands.append(borrowed(tensor))
            continue
        things.append(store.create(tensor.nbytes))
        operands.append(_native.UpdateOperand.on_disk(things[-1], tensor.nbytes))
        if i < 2:
            write(store, arena, things[-1], tensor)
    submit(pipeline, values, operands, []).wait()
    for thing, tensor in zip(things, expected.tensors(), strict=False):
        assert torch.equal(read(store, arena, thing, tensor), tensor)
    assert all(torch.equal(a, b) for a, b in zip(values.scales, expected.scales, strict=True))
    pipeline.close()


def write(
    store: _native.SwapStore, arena: _native.HostArena, thing: int, tensor: torch.Tensor
) -> None:
    lease = arena.allocate(tensor.nbytes)
    torch.frombuffer(lease, dtype=tensor.dtype, count=tensor.numel()).copy_(tensor)
    store.write(thing, lease, tensor.nbytes).wait()


def read(
    store: _native.SwapStore, arena: _native.HostArena, thing: int, like: torch.Tensor
) -> torch.Tensor:
    lease = arena.allocate(like.nbytes)
    store.read(thing, lease, like.nbytes).wait()
    return torch.frombuffer(lease, dtype=like.dtype, count=like.numel())


def test_loaded(store: _native.SwapStore) -> None:
    """A loaded operand is in its lease afterwards, and on disk."""
    arena = _native.HostArena(32 * MIB)
    values = Values(BLOCK // 4 + 3, 3)
    expected = values.updated([])
    staging = _native.UpdatePipeline.min_staging_bytes()
    pipeline = _native.UpdatePipeline(store, arena, staging, threads=1)
    param, grad = (store.create(tensor.nbytes) for tensor in (values.param, values.grad))
    leases = []
    operands = []
    for thing, tensor in ((param, values.param), (grad, values.grad)):
        write(store, arena, thing, tensor)
        leases.append(arena.allocate(tensor.nbytes))
        operands.append(_native.UpdateOperand.loaded(thing, leases[-1], tensor.nbytes))
    operands += [borrowed(state) for state in values.states]
    submit(pipeline, values, operands, []).wait()
    for thing, lease, tensor in zip((param, grad), leases, expected.tensors(), strict=False):
        assert torch.equal(floats(lease)[: values.numel], tensor)
        assert torch.equal(read(store, arena, thing, tensor), tensor)
    assert all(torch.equal(a, b) for a, b in zip(values.states, expected.states, strict=True))
    pipeline.close()


def test_initial_value_of_a_state(store: _native.SwapStore) -> None:
    arena = _native.HostArena(32 * MIB)
    numel = 1000
    rule = _native.UpdateHyper("adagrad", lr=0.1, eps=1e-10, rounding=aten_rounding())
    param, grad = torch.randn(numel), torch.randn(numel)
    expected = torch.nn.Parameter(param.clone())
    reference = torch.optim.Adagrad(
        [expected], lr=0.1, initial_accumulator_value=0.25, foreach=False
    )
    expected.grad = grad.clone()
    reference.step()
    thing = store.create(4 * numel)
    state = _native.UpdateOperand.on_disk(thing, 4 * numel, initial=0.25)
    staging = _native.UpdatePipeline.min_staging_bytes()
    pipeline = _native.UpdatePipeline(store, arena, staging, threads=1)
    segment = _native.UpdateSegment(0, numel, rule, [])
    operands = [borrowed(param), borrowed(grad)]
    pipeline.submit(numel, FP32, 0, *operands, None, [state], [], [segment]).wait()
    assert torch.equal(param, expected)
    assert torch.equal(read(store, arena, thing, param), reference.state[expected]["sum"])
    pipeline.close()


class Owner:
    """Something that can be seen to go."""


def test_borrowed_memory_is_let_go_of_with_the_job() -> None:
    pipeline = _native.UpdatePipeline(None, None, 0, threads=1)
    values = Values(1000, 4)
    expected = values.updated([])
    owner = Owner()
    ref = weakref.ref(owner)
    transfer = submit(pipeline, values, [borrowed(t, owner) for t in values.tensors()], [])
    del owner
    transfer.wait()
    assert ref() is None
    assert values.equal(expected)
    # Also where the job is never waited for, or never was one.
    owner = Owner()
    ref = weakref.ref(owner)
    operands = [borrowed(tensor, owner) for tensor in values.tensors()]
    del owner
    submit(pipeline, values, operands, [])
    operands[0] = _native.UpdateOperand.borrowed(0, 0, None)
    with pytest.raises(OffloadError, match="parameter"):
        submit(pipeline, values, operands, [])
    assert ref() is not None
    del operands
    pipeline.close()
    assert ref() is None


def test_a_pipeline_that_is_dropped_finishes_without_deadlock() -> None:
    """Its threads never wait for the GIL, which whoever drops it holds."""
    values = Values(BLOCK, 5)
    expected = values.updated([])
    pipeline = _native.UpdatePipeline(None, None, 0, threads=2)
    submit(pipeline, values, [borrowed(t, Owner()) for t in values.tensors()], [])
    del pipeline
    assert values.equal(expected)


def test_staging_counts_against_the_arena() -> None:
    least = _native.UpdatePipeline.min_staging_bytes()
    arena = _native.HostArena(2 * least)
    pipeline = _native.UpdatePipeline(None, arena, least, threads=1)
    assert arena.usage()["in_use"] == least
    with pytest.raises(BudgetError):
        _native.UpdatePipeline(None, arena, 2 * least, threads=1)
    pipeline.close()


def test_segments_that_do_not_fit() -> None:
    values = Values(100, 6)
    before = values.clone()
    pipeline = _native.UpdatePipeline(None, None, 0, threads=1)
    param, grad, *states = (borrowed(tensor) for tensor in values.tensors())
    for ranges in ([(0, 101)], [(50, 60), (0, 10)], [(0, 10), (9, 20)]):
        segments = [_native.UpdateSegment(a, b, hyper(), []) for a, b in ranges]
        with pytest.raises(OffloadError):
            pipeline.submit(100, FP32, 0, param, grad, None, states, [], segments)
    with pytest.raises(OffloadError, match="4 states"):
        pipeline.submit(100, FP32, 0, param, grad, None, 2 * states, [], [])
    assert values.equal(before)
    pipeline.close()
    with pytest.raises(OffloadError):
        submit(pipeline, values, [param, grad, *states], [])


class Busy:
    """A pipeline with enough in-memory jobs for about `seconds`; all run on one native thread."""

    def __init__(self, seconds: float) -> None:
        values = Values(MIB, seed=4)
        operands = [borrowed(tensor) for tensor in values.tensors()]
        self.pipeline = _native.UpdatePipeline(None, None, staging_bytes=0, threads=1)
        fastest = math.inf
        for _ in range(4):
            start = time.perf_counter()
            submit(self.pipeline, values, operands, []).wait()
            fastest = min(fastest, time.perf_counter() - start)
        for _ in range(int(seconds / fastest)):
            self.last = submit(self.pipeline, values, operands, [])


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
