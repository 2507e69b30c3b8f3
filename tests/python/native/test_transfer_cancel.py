"""Transfers cancelled, and stores closed, while requests wait and others are in flight."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from offload import OffloadError, TransferCancelledError, _native

MIB = 2**20
BLOCK = 2**16
OBJECTS = 24
IN_FLIGHT = 12
MOST = 3 * BLOCK
TRANSFERS = 6000


@pytest.fixture(params=["io_uring", "threads"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> _native.SwapStore:
    """Small blocks and few places: most requests wait."""
    engine: str = request.param
    if engine == "io_uring" and _native.SwapStore(str(tmp_path)).engine != engine:
        pytest.skip("io_uring is not offered here")
    return _native.SwapStore(str(tmp_path), engine, queue_depth=2, threads=2, block_bytes=BLOCK)


@pytest.fixture
def arena() -> _native.HostArena:
    return _native.HostArena(16 * MIB)


def words(lease: _native.Lease) -> npt.NDArray[np.uint64]:
    return np.frombuffer(memoryview(lease), np.uint64)


@dataclass
class Load:
    """A transfer under way, and the version that it writes or has to find."""

    transfer: _native.Transfer
    item: int
    version: int
    back: _native.Lease | None  # of a read
    cancelled: bool = False


def test_random_cancels_agree_with_a_model(
    store: _native.SwapStore, arena: _native.HostArena
) -> None:
    dice = random.Random(51)
    with closing(store):
        store.reserve(OBJECTS * MOST, (IN_FLIGHT + 1) * MOST)
        sizes = [8 * dice.randint(1, MOST // 8) for _ in range(OBJECTS)]
        things = [store.create(nbytes) for nbytes in sizes]
        held, loads = [0] * OBJECTS, deque[Load]()
        ended = {"write": 0, "read": 0, "cancelled write": 0, "cancelled read": 0}

        def begin(item: int, version: int, is_write: bool) -> None:
            lease = arena.allocate(sizes[item])
            if is_write:
                words(lease)[:] = version
                transfer = store.write(things[item], lease, sizes[item])
                loads.append(Load(transfer, item, version, None))
            else:
                transfer = store.read(things[item], lease, sizes[item])
                loads.append(Load(transfer, item, held[item], lease))

        def end_oldest() -> None:
            load = loads.popleft()
            kind = "write" if load.back is None else "read"
            try:
                load.transfer.wait()
            except TransferCancelledError:
                assert load.cancelled
                ended["cancelled " + kind] += 1
                return
            ended[kind] += 1
            if load.back is None:
                held[load.item] = load.version
            else:
                assert (words(load.back)[: sizes[load.item] // 8] == load.version).all()

        for item in range(OBJECTS):
            begin(item, 0, is_write=True)
            end_oldest()
        free = store.stats()["free_bytes"]
        for version in range(1, TRANSFERS + 1):
            busy = {load.item for load in loads}
            begin(
                dice.choice([i for i in range(OBJECTS) if i not in busy]),
                version,
                dice.random() < 0.5,
            )
            if dice.random() < 0.5:
                chosen = loads[-1 - dice.randrange(min(3, len(loads)))]
                chosen.transfer.cancel()
                chosen.cancelled = True
            if len(loads) >= IN_FLIGHT:
                end_oldest()
        while loads:
            end_oldest()
        assert sum(ended.values()) == TRANSFERS + OBJECTS
        assert min(ended.values()) > TRANSFERS // 100, ended
        assert arena.usage()["in_use"] == 0
        assert store.stats()["free_bytes"] == free
        for item in range(OBJECTS):
            begin(item, 0, is_write=False)
            end_oldest()
            store.remove(things[item])
        stats = store.stats()
        assert stats["free_bytes"] == stats["reserved_bytes"]


def test_cancel_after_the_end_changes_nothing(
    store: _native.SwapStore, arena: _native.HostArena
) -> None:
    with closing(store):
        store.reserve(MIB, MIB)
        thing, lease = store.create(MIB), arena.allocate(MIB)
        words(lease)[:] = 7
        transfer = store.write(thing, lease, MIB)
        transfer.wait()
        transfer.cancel()
        transfer.wait()
        assert transfer.done()
        words(lease)[:] = 0
        store.read(thing, lease, MIB).wait()
        assert (words(lease) == 7).all()


def test_closing_under_load_ends_every_transfer(
    store: _native.SwapStore, arena: _native.HostArena
) -> None:
    nbytes, count = 4 * BLOCK, 40
    store.reserve(count * nbytes, count * nbytes)
    things = [store.create(nbytes) for _ in range(count)]
    for thing in things:
        store.write(thing, arena.allocate(nbytes), nbytes).wait()
    transfers: list[_native.Transfer] = []
    said: list[str] = []

    def load() -> None:
        try:
            while True:
                for i, thing in enumerate(things):
                    move = store.write if i % 2 else store.read
                    transfers.append(move(thing, arena.allocate(nbytes), nbytes))
                for transfer in transfers[-count:]:
                    transfer.wait()
        except OffloadError as error:
            said.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    while thread.is_alive() and len(transfers) < 3 * count:
        time.sleep(0.001)
    store.close()
    thread.join(20)
    assert not thread.is_alive()
    assert len(said) == 1, "the load ended by itself"
    for transfer in transfers:
        assert transfer.done(), "close() left something in flight"
        try:
            transfer.wait()
        except OffloadError as error:
            said.append(str(error))
    assert all("closed" in message for message in said), said
    assert len(said) <= len(transfers), "nothing was done before"
    del transfer
    assert arena.usage()["in_use"] == 0
