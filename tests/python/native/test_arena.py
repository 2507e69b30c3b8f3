"""HostArena and Lease as Python sees them."""

from __future__ import annotations

import gc
import re

import pytest
import torch

from offload import BudgetError, OffloadError, UnsupportedError, _native

PAGE = 4096


def in_use(arena: _native.HostArena) -> int:
    gc.collect()
    return arena.usage()["in_use"]


def test_usage() -> None:
    arena = _native.HostArena(10 * PAGE + 17)
    assert arena.usage()["budget"] == 10 * PAGE
    assert arena.usage()["in_use"] == 0
    lease = arena.allocate(PAGE + 1)
    assert lease.nbytes == 2 * PAGE
    assert lease.address % PAGE == 0
    usage = arena.usage()
    assert (usage["in_use"], usage["peak"]) == (2 * PAGE, 2 * PAGE)
    assert usage["largest_free"] == 8 * PAGE
    del lease
    usage = arena.usage()
    assert (usage["in_use"], usage["peak"], usage["allocations"]) == (0, 2 * PAGE, 1)
    assert usage["largest_free"] == usage["committed"] == 10 * PAGE
    assert isinstance(arena.note, str)


def test_tensor_keeps_the_memory() -> None:
    arena = _native.HostArena(4 * PAGE)
    lease = arena.allocate(2 * PAGE)
    address = lease.address
    tensor = torch.frombuffer(lease, dtype=torch.float32)
    assert tensor.data_ptr() == address
    assert tensor.numel() * 4 == 2 * PAGE
    part = tensor[100:200].view(10, 10).t()
    del lease, tensor
    assert in_use(arena) == 2 * PAGE
    assert arena.try_allocate(3 * PAGE) is None, "memory that a tensor refers to was handed out"
    part.fill_(3.0)
    assert bool((part == 3.0).all())
    del part
    assert in_use(arena) == 0
    assert arena.try_allocate(4 * PAGE) is not None


def test_memory_outlives_the_arena_object() -> None:
    tensor = torch.frombuffer(_native.HostArena(PAGE).allocate(PAGE), dtype=torch.uint8)
    gc.collect()
    tensor.fill_(9)
    assert int(tensor.sum()) == 9 * PAGE


def test_buffer_is_the_memory() -> None:
    lease = _native.HostArena(PAGE).allocate(PAGE)
    view = memoryview(lease)
    assert (view.nbytes, view.format, view.readonly) == (PAGE, "B", False)
    view[5] = 77
    assert int(torch.frombuffer(lease, dtype=torch.uint8)[5]) == 77


def test_budget_is_hard() -> None:
    arena = _native.HostArena(4 * PAGE)
    lease = arena.allocate(3 * PAGE)
    assert arena.try_allocate(2 * PAGE) is None
    with pytest.raises(BudgetError, match=rf"{4 * PAGE}") as caught:
        arena.allocate(2 * PAGE)
    assert isinstance(caught.value, MemoryError)
    del lease
    assert arena.allocate(4 * PAGE).nbytes == 4 * PAGE


def test_poison() -> None:
    arena = _native.HostArena(PAGE, poison=True)
    torch.frombuffer(arena.allocate(PAGE), dtype=torch.float32).fill_(1.0)
    gc.collect()
    again = torch.frombuffer(arena.allocate(PAGE), dtype=torch.float32)
    assert bool(again.isnan().all())


@pytest.mark.parametrize("budget", [0, PAGE - 1])
def test_budget_below_a_page(budget: int) -> None:
    with pytest.raises(OffloadError, match="at least one page") as caught:
        _native.HostArena(budget)
    assert type(caught.value) is OffloadError


def test_wrong_sizes() -> None:
    arena = _native.HostArena(PAGE)
    for call in (arena.allocate, arena.try_allocate):
        with pytest.raises(OffloadError, match="0 bytes"):
            call(0)
        with pytest.raises(TypeError):
            call(-1)


def test_pinning_works_or_is_refused() -> None:
    arena, refusal = None, ""
    try:
        arena = _native.HostArena(PAGE, pin="cuda")
    except UnsupportedError as error:
        refusal = str(error)
    if arena is None:
        assert re.search("page-locked for CUDA: .*(this build has no CUDA|cudaError)", refusal)
    else:
        tensor = torch.frombuffer(arena.allocate(PAGE), dtype=torch.uint8)
        assert tensor.is_pinned() or not torch.cuda.is_available()


def test_pinning_for_something_else_is_refused() -> None:
    with pytest.raises(OffloadError, match="'cuda', not 'rocm'"):
        _native.HostArena(PAGE, pin="rocm")  # type: ignore[arg-type]
