"""Transfers between disk, host and device through the bindings."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from offload import OffloadError, TransferCancelledError, UnorderedAccessError, _native

MIB = 1 << 20
NBYTES = MIB + 512
COUNT = NBYTES // 4


class Chain:
    def __init__(self, path: Path, pace: str, **options: float) -> None:
        self.device = _native.simulated_device(8 * MIB, pace=pace, **options)  # type: ignore[arg-type]
        self.host = _native.HostArena(16 * MIB, poison=True, pin=self.device)
        self.arena = _native.DeviceArena(self.device, 3 * MIB, poison=True)
        self.transfers = _native.DeviceTransfers(self.device)
        self.store = _native.SwapStore(str(path), engine="threads")
        self.store.reserve(16 * MIB, 8 * MIB)

    def lease(self) -> _native.Lease:
        return self.host.allocate(NBYTES)

    def object(self, value: float) -> int:
        lease = self.lease()
        torch.frombuffer(lease, dtype=torch.float32, count=COUNT).fill_(value)
        made = self.store.create(NBYTES)
        self.store.write(made, lease, NBYTES).wait()
        return made

    def value(self, stored: int) -> torch.Tensor:
        lease = self.lease()
        self.store.read(stored, lease, NBYTES).wait()
        return torch.frombuffer(lease, dtype=torch.float32, count=COUNT)


@pytest.fixture(params=["timed", "earliest", "latest"])
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Chain:
    return Chain(tmp_path, request.param)


def view(lease: _native.DeviceLease, access: str = "write") -> torch.Tensor:
    return torch.frombuffer(lease.view(access), dtype=torch.float32, count=COUNT)  # type: ignore[arg-type]


def test_a_step_of_many_units_through_little_memory(chain: Chain) -> None:
    units = [chain.object(float(i)) for i in range(5)]
    spills = []
    for i, unit in enumerate(units):
        lease = chain.arena.allocate(NBYTES, f"unit {i}")
        chain.transfers.fetch(
            lease, chain.lease(), NBYTES, store=chain.store, object=unit
        ).wait_stream()
        tensor = view(lease)
        assert tensor.eq(i).all()
        tensor.add_(10)
        del tensor
        computed = chain.device.record("compute")
        spills.append(
            chain.transfers.spill(
                lease, chain.lease(), NBYTES, after=computed, store=chain.store, object=unit
            )
        )
        del lease
    assert chain.device.stats()["host_waits"] == 0
    for spill in spills:
        spill.wait()
        assert spill.done()
    assert all(chain.value(unit).eq(i + 10).all() for i, unit in enumerate(units))
    assert chain.device.stats()["conflicts"] == 0
    assert chain.arena.usage()["in_use"] == 0
    assert chain.transfers.stats()["stalls"] <= 5


def test_waiting_for_one_that_has_ended_orders_what_follows(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "earliest")
    lease, host = chain.arena.allocate(NBYTES, "unit"), chain.lease()
    torch.frombuffer(host, dtype=torch.float32, count=COUNT).fill_(1)
    fetched = chain.transfers.fetch(lease, host, NBYTES)
    while not fetched.done():
        time.sleep(0.001)
    fetched.wait()
    chain.transfers.spill(lease, host, NBYTES).wait()
    assert chain.device.stats()["conflicts"] == 0


def test_in_host_memory_only(chain: Chain) -> None:
    source = chain.lease()
    torch.frombuffer(source, dtype=torch.float32, count=COUNT).fill_(3)
    lease = chain.arena.allocate(NBYTES)
    fetch = chain.transfers.fetch(lease, source, NBYTES)
    assert fetch.issued()
    fetch.wait_stream("d2h")
    back = chain.lease()
    chain.transfers.spill(lease, back, NBYTES).wait()
    assert torch.frombuffer(back, dtype=torch.float32, count=COUNT).eq(3).all()


@pytest.mark.parametrize("pace", ["earliest", "latest"])
@pytest.mark.parametrize("omitted", ["arrival", "result"])
def test_a_missing_wait_raises(tmp_path: Path, pace: str, omitted: str) -> None:
    chain = Chain(tmp_path, pace)
    reasons = {
        "arrival": "copy to the device before its use",
        "result": "use before the copy to the host",
    }
    chain.device.omit_waits(reasons[omitted])
    lease = chain.arena.allocate(NBYTES, "unit")
    with pytest.raises(UnorderedAccessError, match="'unit'"):  # noqa: PT012
        chain.transfers.fetch(lease, chain.lease(), NBYTES).wait_stream()
        view(lease).add_(1)
        chain.transfers.spill(lease, chain.lease(), NBYTES, after=chain.device.record("compute"))


def test_cancelled_and_wrong_arguments(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "latest")
    unit = chain.object(1.0)
    lease = chain.arena.allocate(NBYTES)
    view(lease).fill_(2.0)
    computed = chain.device.record("compute")
    spill = chain.transfers.spill(
        lease, chain.lease(), NBYTES, after=computed, store=chain.store, object=unit
    )
    spill.cancel()
    with pytest.raises(TransferCancelledError):
        spill.wait()
    assert chain.value(unit).eq(1).all()
    with pytest.raises(OffloadError, match="both a store and an object"):
        chain.transfers.fetch(lease, chain.lease(), NBYTES, object=unit)
    with pytest.raises(OffloadError, match="does not fit a device lease"):
        chain.transfers.fetch(lease, chain.host.allocate(4 * MIB), 4 * MIB)


def test_ctrl_c_leaves_the_transfer_going(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "timed", delay_s=0.4)
    unit = chain.object(1.0)
    lease = chain.arena.allocate(NBYTES)
    view(lease).fill_(2.0)
    spill = chain.transfers.spill(
        lease,
        chain.lease(),
        NBYTES,
        after=chain.device.record("compute"),
        store=chain.store,
        object=unit,
    )
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        spill.wait()
    timer.join()
    spill.wait()
    assert chain.value(unit).eq(2).all()
