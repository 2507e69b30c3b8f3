"""Saved tensors come back as they were; so do the memory and the disk that they took."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload import Budget, BudgetError, OffloadError, Policy, SwapSpaceError, _native
from offload.tiers.activation_handle import Handle
from offload.tiers.activation_home import ActivationHome
from offload.tiers.activation_range import LEAST_STORAGE_BYTES, byte_range
from offload.tiers.swap_space import SwapSpace

MIB = 1 << 20
MakeHome = Callable[..., ActivationHome]


@pytest.fixture
def make_home(tmp_path: Path) -> Iterator[MakeHome]:
    homes: list[ActivationHome] = []

    def make(
        arena_bytes: int = 8 * MIB, disk: int | None = 256 * MIB, eager: bool = True
    ) -> ActivationHome:
        policy = Policy(
            budget=Budget(host=64 * MIB, disk=disk), swap_dir=tmp_path, calibrate_disk=False
        )
        home = ActivationHome(
            _native.HostArena(arena_bytes, True),
            SwapSpace(policy, ()) if disk is not None else None,
            threading.RLock(),
            eager=eager,
            owns_space=True,
        )
        homes.append(home)
        return home

    yield make
    for home in homes:
        home.close()


def in_use(home: ActivationHome) -> int:
    """Bytes of the arena, once what was discarded is not in flight any more."""
    deadline = time.monotonic() + 10
    home.tidy()
    while home._discarded and time.monotonic() < deadline:
        time.sleep(0.01)
        home.tidy()
    return home.mover.home.usage()["in_use"]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def save(home: ActivationHome, tensor: torch.Tensor) -> Handle:
    handle = home.save(tensor)
    assert handle is not None
    return handle


BASE = torch.randn(64, 32, 96)
VIEWS = {
    "whole": BASE,
    "transposed": BASE.transpose(0, 2),
    "row": BASE[3:40],
    "interleaved": BASE[:, :, 32:64],
    "every-other": BASE[::2],
    "expanded": BASE[:, :1, :].expand(64, 32, 96),
    "channels-last": torch.randn(4, 16, 20, 20).contiguous(memory_format=torch.channels_last),
    "as-bytes": BASE.view(torch.uint8)[5:],
    "odd-offset": BASE.flatten()[1:],
    "bf16": torch.randn(300, 300).to(torch.bfloat16),
    "half": torch.randn(300, 300).to(torch.float16),
    "double": torch.randn(300, 300, dtype=torch.float64),
    "complex": torch.randn(300, 300, dtype=torch.complex64),
    "int64": torch.arange(100_000),
    "bool": torch.rand(300, 300) > 0.5,
    "float8": torch.randn(300, 300).to(torch.float8_e4m3fn),
    "scalar-view": BASE[5, 5, 5],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_saved_tensor_comes_back_as_it_was(name: str, make_home: MakeHome) -> None:
    home = make_home(4 * MIB)
    tensor = VIEWS[name]
    handle = save(home, tensor)
    others = [save(home, torch.randn(MIB // 4)) for _ in range(4)]  # send it to disk
    found = home.load(handle)
    assert found.dtype is tensor.dtype
    assert found.shape == tensor.shape
    assert found.stride() == tensor.stride()
    assert found.data_ptr() % 64 == tensor.data_ptr() % 64
    assert torch.equal(_bytes(found), _bytes(tensor))
    assert home.mover.read_bytes > 0
    del others


def test_small_storages_and_wide_gaps_are_left_alone(make_home: MakeHome) -> None:
    home = make_home()
    assert home.save(torch.randn(LEAST_STORAGE_BYTES // 4 - 1)) is None
    assert home.save(torch.randn(1000, 100)[:, 0]) is None
    assert home.save(torch.randn(0, 10)) is None
    assert home.save(torch.randn(LEAST_STORAGE_BYTES // 4)) is not None


def test_interleaved_views_share_one_copy(make_home: MakeHome) -> None:
    home = make_home()
    qkv = torch.randn(2, 64, 3, 4, 32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    handles = [save(home, x) for x in (q, k, v, q, qkv)]
    assert home.saved_bytes == qkv.nbytes
    for handle, tensor in zip(handles, (q, k, v, q, qkv), strict=True):
        assert torch.equal(home.load(handle), tensor)
    del handles[:4], handle
    assert in_use(home) == qkv.nbytes  # the last one still stands for all
    handles.clear()
    assert in_use(home) == 0


def test_dense_parts_of_a_storage_are_saved_by_themselves() -> None:
    first, second = torch.randn(2, 65536).unbind()
    assert byte_range(first) == (0, 262144)
    assert byte_range(second) == (262144, 524288)


def test_a_storage_changed_in_place_is_copied_again(make_home: MakeHome) -> None:
    home = make_home()
    tensor = torch.zeros(100_000)
    before = save(home, tensor)
    tensor.add_(1)
    after = save(home, tensor)
    assert torch.equal(home.load(after), torch.ones(100_000))
    with pytest.raises(RuntimeError, match=r"modified by an inplace .* at version 1"):
        home.load(before)


def test_a_change_through_a_detached_tensor_is_not_missed(make_home: MakeHome) -> None:
    """``.data`` has a version counter of its own, which begins at 0 again."""
    home = make_home()
    tensor = torch.zeros(100_000)
    first = save(home, tensor)
    tensor.add_(1)
    assert torch.equal(home.load(save(home, tensor.data)), torch.ones(100_000))
    del first


def test_memory_at_the_same_address_is_not_taken_for_the_same_tensor(make_home: MakeHome) -> None:
    home = make_home()
    memory, handles = bytearray(400_000), []
    for i in range(8):
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        tensor.fill_(i)
        handles.append(save(home, tensor))
        del tensor
    for i, handle in enumerate(handles):
        assert torch.equal(home.load(handle), torch.full((100_000,), float(i)))


def test_many_times_the_arena_passes_through_it(make_home: MakeHome) -> None:
    home = make_home(4 * MIB)
    tensors = [torch.randn(MIB // 8) for _ in range(64)]  # 32 MiB
    for _ in range(3):
        handles = [save(home, tensor) for tensor in tensors]
        for tensor in reversed(tensors):
            assert torch.equal(home.load(handles.pop()), tensor)
    usage = home.mover.home.usage()
    assert usage["peak"] <= 4 * MIB
    assert in_use(home) == 0
    assert home.live_bytes == 0
    assert home.mover.misses <= 6  # the rest was read ahead


def test_what_the_arena_still_holds_is_not_written(make_home: MakeHome) -> None:
    home = make_home(4 * MIB)
    tensors = [torch.randn(MIB // 8) for _ in range(16)]  # 8 MiB
    for step in range(3):
        written = home.mover.written_bytes
        handles = [save(home, tensor) for tensor in tensors]
        for _ in tensors:
            home.load(handles.pop())
        written = home.mover.written_bytes - written
        assert written == (8 * MIB if step == 0 else 5 * MIB)  # 3/4 of the arena stay


def test_nothing_is_written_when_all_fits(make_home: MakeHome) -> None:
    home = make_home(8 * MIB, eager=False)
    tensors = [torch.randn(MIB // 8) for _ in range(8)]
    for _ in range(2):
        handles = [save(home, tensor) for tensor in tensors]
        while handles:
            home.load(handles.pop())
    assert home.mover.written_bytes == 0
    assert home.store is not None
    assert home.store.stats()["reserved_bytes"] == 0


def test_without_a_disk_what_does_not_fit_is_refused(make_home: MakeHome) -> None:
    home = make_home(2 * MIB, disk=None)
    handles = [save(home, torch.randn(MIB // 4)) for _ in range(2)]
    with pytest.raises(BudgetError, match=r"activation_bytes=...\), or give Policy\(swap_dir"):
        home.save(torch.randn(MIB // 4))
    handles.pop()
    handles.append(save(home, torch.randn(MIB // 4)))


def test_what_is_larger_than_the_arena_is_refused(make_home: MakeHome) -> None:
    home = make_home(MIB)
    with pytest.raises(BudgetError, match=r"float32 \[1000, 1000\].*4000000 bytes.*1048576 for"):
        home.save(torch.randn(1000, 1000))


def test_loaded_tensors_keep_their_memory(make_home: MakeHome) -> None:
    home = make_home(4 * MIB)
    tensors = [torch.randn(MIB // 4) for _ in range(12)]
    handles = [save(home, tensor) for tensor in tensors]
    found = home.load(handles[0])
    for handle in handles[1:]:
        home.load(handle)
    handles.clear()
    del handle
    assert torch.equal(found, tensors[0])
    assert in_use(home) == MIB
    del found
    assert in_use(home) == 0


def test_places_on_disk_are_used_again(make_home: MakeHome) -> None:
    home = make_home(4 * MIB)
    assert home.store is not None
    reserved = []
    for step in range(6):
        numel = MIB // 8 + 1024 * (step % 3)
        handles = [save(home, torch.randn(numel)) for _ in range(32)]
        while handles:
            home.load(handles.pop())
        reserved.append(home.store.stats()["reserved_bytes"])
        assert home.store.stats()["objects"] <= 33
    assert reserved[5] == reserved[2]


def test_the_disk_budget_is_kept(make_home: MakeHome) -> None:
    home = make_home(4 * MIB, disk=16 * MIB)
    handles = []
    with pytest.raises(SwapSpaceError, match=r"Budget\(disk=16777216\) is too small"):
        handles += [save(home, torch.randn(MIB // 4)) for _ in range(32)]


def test_handles_that_die_inside_an_operation_are_freed_later(make_home: MakeHome) -> None:
    """A collection of garbage may come at any moment."""
    home = make_home()
    handle = save(home, torch.randn(MIB // 4))
    with home._operation():
        del handle
        assert home.live_bytes == MIB
    assert in_use(home) == 0


def test_handles_that_die_in_another_thread_are_freed(make_home: MakeHome) -> None:
    home = make_home()
    handles = [save(home, torch.randn(MIB // 4)) for _ in range(4)]
    thread = threading.Thread(target=handles.clear)
    with home._lock:
        thread.start()
        thread.join()
        assert home.live_bytes == 4 * MIB
    assert in_use(home) == 0


def test_handles_in_a_cycle_are_freed(make_home: MakeHome) -> None:
    home = make_home()
    cycle: list[object] = [save(home, torch.randn(MIB // 4))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert in_use(home) == 0


def test_a_closed_home_says_so(make_home: MakeHome) -> None:
    home = make_home()
    handle = save(home, torch.randn(MIB // 4))
    home.close()
    with pytest.raises(OffloadError, match="unwrapped between this forward and its backward"):
        home.load(handle)
