"""The device through the bindings: tensors on its memory, streams, and what the checker finds."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from offload import BudgetError, OffloadError, UnorderedAccessError, UnsupportedError, _native

MIB = 1 << 20
PACES = ["timed", "earliest", "latest"]


class Setup:
    def __init__(self, pace: str, **options: object) -> None:
        self.device = _native.simulated_device(8 * MIB, pace=pace, **options)  # type: ignore[arg-type]
        self.host = _native.HostArena(4 * MIB, pin=self.device)
        self.arena = _native.DeviceArena(self.device, 4 * MIB, poison=True)

    def host_tensor(self, values: torch.Tensor) -> _native.Lease:
        lease = self.host.allocate(values.nbytes)
        torch.frombuffer(lease, dtype=values.dtype, count=values.numel()).copy_(values.flatten())
        return lease

    def upload(self, values: torch.Tensor, label: str = "") -> _native.DeviceLease:
        source = self.host_tensor(values)
        lease = self.arena.allocate(values.nbytes, label)
        self.device.copy_to_device(lease, source, values.nbytes)
        arrived = self.device.record("h2d")
        lease.note_use(arrived)
        self.device.wait("compute", arrived, "arrival")
        return lease


@pytest.fixture(params=PACES)
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    yield Setup(request.param)
    gc.collect()


def tensor_of(lease: _native.DeviceLease, count: int, access: str = "write") -> torch.Tensor:
    return torch.frombuffer(lease.view(access), dtype=torch.float32, count=count)  # type: ignore[arg-type]


def test_compute_on_memory_of_the_device(setup: Setup) -> None:
    values = torch.randn(1000)
    lease = setup.upload(values)
    on_device = tensor_of(lease, 1000)
    assert on_device.data_ptr() == lease.address
    assert torch.equal(on_device, values)
    on_device.mul_(2)
    del on_device
    computed = setup.device.record("compute")
    back = setup.host.allocate(4000)
    setup.device.wait("d2h", computed, "result")
    setup.device.copy_to_host(back, lease, 4000)
    home = setup.device.record("d2h")
    lease.note_use(home)
    del lease
    assert setup.device.stats()["host_waits"] == 0
    setup.device.synchronize(home)
    setup.device.use_host(back, "read")
    assert torch.equal(torch.frombuffer(back, dtype=torch.float32, count=1000), values * 2)
    stats = setup.device.stats()
    assert stats["conflicts"] == 0
    assert (stats["h2d_bytes"], stats["d2h_bytes"], stats["copies"]) == (4000, 4000, 2)
    assert stats["waits"]["arrival"] == stats["waits"]["result"] == 1


def test_a_lease_lives_as_long_as_tensors_on_it(setup: Setup) -> None:
    before = setup.arena.usage()["in_use"]
    tensor = tensor_of(setup.upload(torch.ones(1000)), 1000)
    part = tensor[10:20]
    del tensor
    assert setup.arena.usage()["in_use"] > before
    assert part.sum() == 10
    del part
    assert setup.arena.usage()["in_use"] == before
    assert setup.device.stats()["conflicts"] == 0


def test_the_end_of_a_view_orders_the_next_owner(setup: Setup) -> None:
    for i in range(20):
        lease = setup.upload(torch.full((1 << 19,), float(i)))  # half of the arena
        tensor = tensor_of(lease, 1 << 19, "read")
        assert tensor.eq(i).all()
    assert setup.device.stats()["conflicts"] == 0
    assert setup.device.stats()["waits"]["reuse of device memory"] > 0


@pytest.mark.parametrize("pace", PACES)
def test_each_missing_wait_is_found(pace: str) -> None:
    setup = Setup(pace)
    device = setup.device
    device.omit_waits("arrival")
    lease = setup.upload(torch.ones(100), "layer.1")
    with pytest.raises(UnorderedAccessError, match=r"use of 'layer\.1' on compute.*copy to the"):
        lease.view("read")
    device.omit_waits("")
    device.drain()
    tensor = tensor_of(lease, 100)
    back = setup.host.allocate(400)
    with pytest.raises(UnorderedAccessError, match=r"copy to the host of 'layer\.1' on d2h"):
        device.copy_to_host(back, lease, 400)
    del tensor
    assert device.stats()["conflicts"] == 2


def test_what_a_finalizer_finds_fails_the_next_call() -> None:
    setup = Setup("latest")
    lease = setup.upload(torch.ones(100), "layer.1")
    tensor = tensor_of(lease, 100)
    setup.device.wait("h2d", setup.device.record("compute"), "test")
    setup.device.fill(lease, 0, "h2d")
    del tensor  # used until now, while another stream writes
    with pytest.raises(UnorderedAccessError, match=r"use of 'layer\.1'"):
        setup.device.record("h2d")
    setup.device.record("h2d")


def test_early_reads_see_poison_without_the_checker() -> None:
    setup = Setup("latest", check=False)
    setup.device.omit_waits("arrival")
    lease = setup.upload(torch.ones(100))
    assert tensor_of(lease, 100).isnan().all()
    setup.device.drain()
    assert tensor_of(lease, 100).eq(1).all()


def test_errors_name_the_thing_and_the_limit(setup: Setup) -> None:
    with pytest.raises(BudgetError, match="device arena of 4194304 bytes"):
        setup.arena.allocate(5 * MIB)
    assert setup.arena.try_allocate(5 * MIB) is None
    with pytest.raises(BudgetError, match="lower Budget"):
        _native.DeviceArena(setup.device, 8 * MIB)
    lease = setup.arena.allocate(512)
    with pytest.raises(OffloadError, match="a copy of 4096 bytes does not fit: 4096 bytes on the"):
        setup.device.copy_to_device(lease, setup.host.allocate(4096), 4096)
    with pytest.raises(OffloadError, match="pin the HostArena"):
        setup.device.copy_to_device(lease, _native.HostArena(MIB).allocate(512), 512)
    with pytest.raises(OffloadError, match="stream 'copy' is none of"):
        setup.device.record("copy")  # type: ignore[arg-type]
    with pytest.raises(OffloadError, match="access 'rw' is none of"):
        lease.view("rw")  # type: ignore[arg-type]
    with pytest.raises(OffloadError, match="pace 'slow' is none of"):
        _native.simulated_device(MIB, pace="slow")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        _ = lease.view().__cuda_array_interface__
    planned = setup.arena.try_allocate_at(MIB, 1024, "planned")
    assert planned is not None
    assert (planned.offset, planned.nbytes, planned.label) == (MIB, 1024, "planned")
    assert setup.arena.try_allocate_at(MIB + 512, 512) is None
    with pytest.raises(OffloadError, match="starts at a multiple of 512 bytes, not at 100"):
        setup.arena.try_allocate_at(100, 512)


def test_a_lease_is_idle_when_what_was_submitted_has_ended() -> None:
    setup = Setup("latest")
    lease = setup.arena.allocate(512)
    assert not lease.is_idle(), "unused memory is still to be poisoned"
    lease.wait_for_uses()
    assert lease.is_idle()
    setup.device.copy_to_device(lease, setup.host_tensor(torch.ones(128)), 512)
    lease.note_use(setup.device.record("h2d"))
    assert not lease.is_idle()
    lease.wait_for_uses()
    assert lease.is_idle()
    view = lease.view()
    assert lease.is_open
    assert not lease.is_idle()
    del view
    assert lease.is_idle()


def test_ctrl_c_ends_a_wait_and_nothing_is_lost() -> None:
    setup = Setup("timed", delay_s=0.5)
    lease = setup.arena.allocate(512)
    setup.device.copy_to_device(lease, setup.host_tensor(torch.ones(128)), 512)
    arrived = setup.device.record("h2d")
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        setup.device.synchronize(arrived)
    assert time.monotonic() - begin < 0.45
    timer.join()
    setup.device.synchronize(arrived)
    assert setup.device.stats()["host_waits"] == 1
    setup.device.wait("compute", arrived, "arrival")
    assert tensor_of(lease, 128).eq(1).all()


def test_a_machine_without_cuda_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UnsupportedError):
        _native.cuda_device()


@pytest.mark.gpu
def test_a_tensor_on_cuda_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = _native.cuda_device(0, check=True)
    device.set_compute_stream(torch.cuda.current_stream().cuda_stream)
    host = _native.HostArena(4 * MIB, pin=device)
    arena = _native.DeviceArena(device, 4 * MIB, poison=True)
    source = host.allocate(4096)
    torch.frombuffer(source, dtype=torch.float32).copy_(torch.arange(1024.0))
    lease = arena.allocate(4096)
    device.copy_to_device(lease, source, 4096)
    arrived = device.record("h2d")
    lease.note_use(arrived)
    device.wait("compute", arrived, "arrival")
    tensor = torch.as_tensor(lease.view(), device="cuda:0").view(torch.float32)
    assert tensor.data_ptr() == lease.address
    assert torch.equal((tensor * 2).cpu(), torch.arange(1024.0) * 2)
    assert device.stats()["conflicts"] == 0


def test_an_arena_over_a_tensor_keeps_it(setup: Setup) -> None:
    memory = torch.zeros(4 * 512 + 512, dtype=torch.uint8)
    start = -(-memory.data_ptr() // 512) * 512
    known = weakref.ref(memory)
    arena = _native.DeviceArena.over(setup.device, start, 4 * 512, memory, poison=True)
    del memory
    assert arena.usage()["budget"] == 4 * 512
    lease = arena.allocate(1024, "lease")
    assert lease.address == start
    source = setup.host_tensor(torch.arange(256.0))
    setup.device.copy_to_device(lease, source, 1024)
    arrived = setup.device.record("h2d")
    setup.device.wait("compute", arrived, "arrival")
    lease.note_use(arrived)
    part = torch.frombuffer(lease.view(offset=512, nbytes=64), dtype=torch.float32)
    assert torch.equal(part, torch.arange(128.0, 144.0))
    del arena, lease
    gc.collect()
    assert known() is not None
    del part
    gc.collect()
    setup.device.drain()
    assert known() is None
    with pytest.raises(OffloadError, match="do not begin at a multiple of 512"):
        _native.DeviceArena.over(setup.device, start + 8, 512, None)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (512, None), (500, 13), (1024, 1)])
def test_a_view_is_a_part_of_its_lease(setup: Setup, offset: int, nbytes: int | None) -> None:
    lease = setup.arena.allocate(512)
    with pytest.raises(OffloadError, match="are no part of 512"):
        lease.view(offset=offset, nbytes=nbytes)
    assert lease.view(offset=500).nbytes == 12
    assert lease.view(offset=500, nbytes=12).nbytes == 12
