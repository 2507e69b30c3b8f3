"""Activations of a device: they leave and come back as they were, and nothing waits that need not.

The device is a simulated one, whose memory is taken to be torch's CPU tensors.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import offload
from offload import Budget, Policy, _native
from offload.tiers.activation_carrier import ActivationCarrier
from offload.tiers.activation_handle import Handle
from offload.tiers.activation_home import ActivationHome
from offload.tiers.compute_device import CPU, ComputeDevice
from offload.tiers.slab import Residency
from offload.tiers.swap_space import SwapSpace

MIB = 1 << 20
PACES = ["timed", "earliest", "latest"]
BEFORE = "work on a tensor before a copy of it"
ARRIVAL = "copy to the device before its use"
MakeHome = Callable[..., ActivationHome]
BASE = torch.randn(64, 32, 96)
VIEWS = {
    "whole": BASE,
    "transposed": BASE.transpose(0, 2),
    "row": BASE[3:40],
    "interleaved": BASE[:, :, 32:64],
    "expanded": BASE[:, :1, :].expand(64, 32, 96),
    "as-bytes": BASE.view(torch.uint8)[5:],
    "odd-offset": BASE.flatten()[1:],
    "bf16": torch.randn(300, 301).to(torch.bfloat16)[1:],
    "double": torch.randn(300, 300, dtype=torch.float64),
    "complex": torch.randn(300, 300, dtype=torch.complex64),
    "bool": torch.rand(300, 301) > 0.5,
}


@pytest.fixture
def make_home(tmp_path: Path) -> Iterator[MakeHome]:
    homes: list[ActivationHome] = []

    def make(
        pace: Any = "latest", arena_bytes: int = 8 * MIB, disk: bool = True, eager: bool = True
    ) -> ActivationHome:
        policy = Policy(budget=Budget(host=64 * MIB), swap_dir=tmp_path, calibrate_disk=False)
        device = ComputeDevice(_native.simulated_device(MIB, pace=pace), CPU)
        home = ActivationHome(
            _native.HostArena(arena_bytes, True, pin=device.native),
            SwapSpace(policy, ()) if disk else None,
            threading.RLock(),
            eager=eager,
            owns_space=True,
            devices=[device],
        )
        homes.append(home)
        return home

    yield make
    for home in homes:
        assert device_of(home).stats()["conflicts"] == 0 or home.left_bytes < 0
        home.close()


def device_of(home: ActivationHome) -> _native.Device:
    assert home.carrier is not None
    return home.carrier._devices[0].native


def save(home: ActivationHome, tensor: torch.Tensor) -> Handle:
    handle = home.save(tensor)
    assert handle is not None
    return handle


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("name", VIEWS)
def test_a_saved_tensor_comes_back_as_it_was(name: str, pace: str, make_home: MakeHome) -> None:
    home = make_home(pace, arena_bytes=4 * MIB)
    tensor = VIEWS[name]
    handle = save(home, tensor)
    others = [save(home, torch.randn(MIB // 4)) for _ in range(5)]  # send it to disk
    for other in reversed(others):
        home.load(other)
    found = home.load(handle)
    assert found.dtype is tensor.dtype
    assert found.shape == tensor.shape
    assert found.stride() == tensor.stride()
    assert found.data_ptr() % 64 == tensor.data_ptr() % 64
    assert torch.equal(_bytes(found), _bytes(tensor))
    stats = device_of(home).stats()
    assert min(stats["d2h_bytes"], stats["h2d_bytes"]) >= 5 * MIB


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("pace", PACES)
def test_random_passes(pace: str, disk: bool, make_home: MakeHome) -> None:
    """Tensors of random sizes, some in views, loaded in the reverse order; the memory holds."""
    home = make_home(pace, arena_bytes=(4 if disk else 24) * MIB, disk=disk, eager=False)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        saved = []
        for _ in range(20):
            numel = int(torch.randint(20_000, 250_000, (), generator=generator))
            tensor = torch.randn(numel, generator=generator)
            saved.append((save(home, tensor), tensor.clone()))
            if numel % 2:
                saved.append((save(home, tensor[numel // 3 :]), tensor[numel // 3 :].clone()))
        while saved:
            handle, expected = saved.pop()
            assert torch.equal(home.load(handle), expected)
            del handle
            assert home.carrier is not None
            assert home.carrier.ahead_bytes <= 2 * 1000_000 + 4096
        gc.collect()
        home.tidy()
    assert home.live_bytes == 0
    assert home.carrier is not None
    assert home.carrier.ahead_bytes == 0
    until(lambda: home.tidy() is None and home.mover.home.usage()["in_use"] == 0)


def test_saving_waits_for_nothing(make_home: MakeHome) -> None:
    home = make_home("latest")
    handles = [save(home, torch.randn(MIB // 4)) for _ in range(6)]
    stats = device_of(home).stats()
    assert stats["host_waits"] == 0
    assert home.mover.stall_seconds == {}
    assert stats["d2h_bytes"] == 6 * MIB
    assert len(handles) == 6


def test_memory_is_lent_until_the_copy_has_ended(make_home: MakeHome) -> None:
    home = make_home("latest", disk=False)
    tensor = torch.randn(MIB // 4)
    expected = tensor.clone()
    handle = save(home, tensor)
    memory = StorageWeakRef(tensor.untyped_storage())
    del tensor
    gc.collect()
    assert not memory.expired()  # nothing has waited for the copy yet
    others = [torch.full((MIB // 4,), float("nan")) for _ in range(4)]
    found = home.load(handle)
    until(memory.expired)
    assert torch.equal(found, expected)
    del others


def test_the_arena_bounds_what_is_in_flight(make_home: MakeHome) -> None:
    home = make_home("latest", arena_bytes=2 * MIB)
    alive = []
    for _ in range(8):
        tensor = torch.randn(MIB // 8)
        save_ = save(home, tensor)
        alive.append((StorageWeakRef(tensor.untyped_storage()), save_))
        del tensor
        assert sum(not memory.expired() for memory, _ in alive) * (MIB // 2) <= 2 * MIB + MIB // 2


def test_a_range_is_copied_once_while_it_is_in_use(make_home: MakeHome) -> None:
    home = make_home("latest")
    qkv = torch.randn(2, 64, 3, 4, 32)
    handles = [save(home, x) for x in qkv.permute(2, 0, 3, 1, 4)]
    found = [home.load(handle) for handle in handles]
    assert device_of(home).stats()["h2d_bytes"] == handles[0].claim.saved.slab.nbytes
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
    for view, expected in zip(found, qkv.permute(2, 0, 3, 1, 4), strict=True):
        assert torch.equal(view, expected)
    del found, view
    carrier, slab = home.carrier, handles[0].claim.saved.slab
    assert carrier is not None
    until(lambda: carrier._found(slab, carrier._devices[0]) is None)
    home.load(handles[0])
    assert device_of(home).stats()["h2d_bytes"] == 2 * handles[0].claim.saved.slab.nbytes


def test_what_comes_next_is_on_its_way_from_the_disk(make_home: MakeHome) -> None:
    home = make_home("earliest", arena_bytes=4 * MIB)
    tensors = [torch.randn(MIB // 4) for _ in range(12)]
    handles = [save(home, tensor) for tensor in tensors]
    home.load(handles.pop())
    assert home.carrier is not None
    assert 0 < home.carrier.ahead_bytes <= 2 * MIB
    for handle, tensor in zip(reversed(handles), reversed(tensors[:-1]), strict=True):
        assert torch.equal(home.load(handle), tensor)
    assert home.mover.read_bytes >= 8 * MIB
    assert home.mover.written_bytes >= 8 * MIB


def test_a_graph_that_is_freed_gives_all_back(make_home: MakeHome) -> None:
    home = make_home("timed", arena_bytes=4 * MIB)
    handles = [save(home, torch.randn(MIB // 4)) for _ in range(8)]
    home.load(handles.pop())  # others are on their way
    handles.clear()
    gc.collect()
    until(lambda: home.tidy() is None and home.mover.home.usage()["in_use"] == 0)
    assert home.carrier is not None
    assert home.carrier.ahead_bytes == 0


@pytest.mark.parametrize("pace", ["earliest", "latest"])
@pytest.mark.parametrize("reason", [BEFORE, ARRIVAL])
def test_no_wait_may_be_missing(reason: str, pace: str, make_home: MakeHome) -> None:
    home = make_home(pace)
    home.left_bytes = -1 << 40  # conflicts are what is looked for
    device_of(home).omit_waits(reason)
    with pytest.raises(offload.UnorderedAccessError):
        home.load(save(home, torch.randn(MIB // 4)))


def test_memory_that_is_read_is_not_given_up(
    make_home: MakeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home("latest", disk=False)
    home.left_bytes = -1 << 40
    tensor = torch.randn(MIB // 4)
    handle = save(home, tensor)
    slab = handle.claim.saved.slab
    home.mover.fetch(slab)
    assert home.carrier is not None
    assert slab.residency is Residency.HOST
    assert home.carrier.bring(home.carrier._devices[0], slab, 0)
    assert home.carrier.is_reading(slab)
    assert home.mover.readers is home.carrier
    monkeypatch.setattr(type(home.mover), "wait", lambda self, transfer, why: None)
    with pytest.raises(offload.UnorderedAccessError, match="on the host"):
        home.mover.settle(slab)
    assert isinstance(home.carrier, ActivationCarrier)


def test_a_change_in_place_is_torchs_error(make_home: MakeHome) -> None:
    home = make_home("latest")
    tensor = torch.randn(MIB // 4)
    handle = save(home, tensor)
    tensor.add_(1)
    again = save(home, tensor)
    assert torch.equal(home.load(again), tensor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        home.load(handle)


@pytest.mark.gpu
@pytest.mark.parametrize("disk", [True, False])
def test_on_a_cuda_device(disk: bool, tmp_path: Path) -> None:
    policy = Policy(budget=Budget(host=64 * MIB), swap_dir=tmp_path, calibrate_disk=False)
    cuda = torch.device("cuda", 0)
    device = ComputeDevice(_native.cuda_device(0, check=True), cuda)
    home = ActivationHome(
        _native.HostArena((8 if disk else 64) * MIB, True, pin=device.native),
        SwapSpace(policy, ()) if disk else None,
        threading.RLock(),
        eager=True,
        owns_space=True,
        devices=[device],
    )
    tensors = [torch.randn(MIB // 4, device=cuda) for _ in range(20)]
    saved = [(save(home, tensor), tensor.cpu()) for tensor in tensors]
    tensors.clear()
    while saved:
        handle, expected = saved.pop()
        found = home.load(handle)
        assert found.device == cuda
        assert torch.equal(found.cpu(), expected)
    assert device.native.stats()["conflicts"] == 0
    home.close()
