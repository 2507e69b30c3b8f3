"""Stores on disks that are too small, or full: a reservation holds, a commit stays."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from offload import SwapSpaceError, _native

MIB = 2**20
BLOCK = 2**16
SIZE = 4 * MIB + 100
Mount = Callable[[str, int], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a new filesystem, "ext4" (on a loop device) or "tmpfs", of so many MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    points: list[Path] = []

    def mount(kind: str, mib: int) -> Path:
        point = tmp_path / f"disk{len(points)}"
        point.mkdir()
        commands = [["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(point)]]
        if kind == "ext4":
            image = point.with_suffix(".image")
            with image.open("wb") as file:
                file.truncate(mib * MIB)
            commands = [
                ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", str(image)],
                ["mount", "-o", "loop", str(image), str(point)],
            ]
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip(f"there is no {command[0]}")
            if done.returncode != 0:
                pytest.skip(f"{command[0]}: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    gc.collect()  # a store that an exception's traceback still refers to keeps its directory busy
    for point in points:
        subprocess.run(["umount", point], check=True)


@pytest.fixture
def arena() -> _native.HostArena:
    return _native.HostArena(16 * MIB)


def allocated(fd: int, offset: int, nbytes: int) -> bool:
    """Whether the filesystem had room for more of a file."""
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def fill(folder: Path) -> Path:
    """Leave no free block in the filesystem of `folder`; removing the file makes room again."""
    path = folder / "filler"
    with path.open("wb") as file:
        end = 0
        for piece in (4 * MIB, 2**18, 2**14, 2**12):
            while allocated(file.fileno(), end, piece):
                end += piece
    with (folder / "probe").open("wb") as probe, pytest.raises(OSError, match="No space left"):
        os.posix_fallocate(probe.fileno(), 0, 4096)
    (folder / "probe").unlink()
    return path


def content(seed: int, nbytes: int = SIZE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def put(store: _native.SwapStore, thing: int, lease: _native.Lease, seed: int) -> None:
    np.frombuffer(memoryview(lease), np.uint8)[:SIZE] = content(seed)
    store.write(thing, lease, SIZE).wait()


def holds(store: _native.SwapStore, thing: int, arena: _native.HostArena, seed: int) -> bool:
    lease = arena.allocate(SIZE)
    store.read(thing, lease, SIZE).wait()
    return np.array_equal(np.frombuffer(memoryview(lease), np.uint8)[:SIZE], content(seed))


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_reservation_beyond_the_disk_is_refused(kind: str, mount: Mount) -> None:
    disk = mount(kind, 48)
    with closing(_native.SwapStore(str(disk))) as store:
        assert store.in_memory == (kind == "tmpfs")
        with pytest.raises(SwapSpaceError) as caught:
            store.reserve(100 * MIB, 28 * MIB)
        assert caught.value.errno == errno.ENOSPC
        message = str(caught.value)
        assert str(disk) in message
        needed = re.search(r"needs (\d+) bytes", message)
        free = re.search(r"more, (\d+) bytes .* free", message)
        assert needed is not None
        assert free is not None
        assert int(needed[1]) == 128 * MIB
        assert 24 * MIB < int(free[1]) <= 48 * MIB
        assert store.stats()["reserved_bytes"] == 0
        store.reserve(8 * MIB, 8 * MIB)  # what fits may still be had
        assert store.stats()["reserved_bytes"] == 16 * MIB


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_what_was_reserved_can_be_written_on_a_full_disk(
    kind: str, engine: str, mount: Mount, arena: _native.HostArena
) -> None:
    disk = mount(kind, 48)
    with closing(_native.SwapStore(str(disk), engine, block_bytes=BLOCK)) as store:
        store.reserve(2 * store.footprint(SIZE), store.footprint(SIZE))
        fill(disk)
        things, lease = [store.create(SIZE), store.create(SIZE)], arena.allocate(SIZE)
        for seed in range(4):  # all slots come to be written, and then replaced
            for i, thing in enumerate(things):
                put(store, thing, lease, 2 * seed + i)
        assert all(holds(store, thing, arena, 6 + i) for i, thing in enumerate(things))
        stats = store.stats()
        assert (stats["failed"], stats["files"][0]["full"]) == (0, False)
        with pytest.raises(SwapSpaceError, match=re.escape(str(disk))):
            store.reserve(4 * store.footprint(SIZE), store.footprint(SIZE))
        assert all(holds(store, thing, arena, 6 + i) for i, thing in enumerate(things))


@pytest.mark.parametrize("freed", [True, False])
def test_a_commit_that_finds_the_disk_full(
    freed: bool, mount: Mount, arena: _native.HostArena
) -> None:
    """It may be tried again once there is room; until then the last commit is what reopens."""
    disk = mount("ext4", 48)
    lease = arena.allocate(SIZE)
    store = _native.SwapStore.open_durable(str(disk), "model", True, block_bytes=BLOCK)
    with closing(store):
        store.reserve(store.footprint(SIZE), 2 * store.footprint(SIZE))
        thing = store.create(SIZE, "weights")
        put(store, thing, lease, 0)
        store.commit()
        filler = fill(disk)
        seed = 0

        def write_and_commit() -> None:
            nonlocal seed
            for _ in range(50):
                seed += 1
                put(store, thing, lease, seed)
                store.commit()

        with pytest.raises(SwapSpaceError) as caught:  # once the journal's last block is full
            write_and_commit()
        assert caught.value.errno == errno.ENOSPC
        assert str(disk) in str(caught.value)
        assert holds(store, thing, arena, seed)
        with pytest.raises(SwapSpaceError):
            store.commit()
        if freed:
            filler.unlink()
            store.commit()
    store = _native.SwapStore.open_durable(str(disk), "model", False, block_bytes=BLOCK)
    with closing(store):
        found = store.find("weights")
        assert found is not None
        assert holds(store, found, arena, seed if freed else seed - 1)


def test_a_reservation_spreads_over_what_fits(mount: Mount, arena: _native.HostArena) -> None:
    disks = [mount("tmpfs", 4), mount("ext4", 48)]
    with closing(_native.SwapStore([str(d) for d in disks], block_bytes=BLOCK)) as store:
        store.reserve(16 * MIB, 8 * MIB)  # even shares would be 12 MiB each
        small, large = (file["reserved_bytes"] for file in store.stats()["files"])
        assert small + large == 24 * MIB
        assert 3 * MIB <= small <= 4 * MIB
        fill(disks[1])
        things, lease = [store.create(SIZE) for _ in range(3)], arena.allocate(SIZE)
        for i, thing in enumerate(things):
            put(store, thing, lease, i)
        assert all(holds(store, thing, arena, i) for i, thing in enumerate(things))
        assert all(file["bytes_written"] > 0 for file in store.stats()["files"])
        with pytest.raises(SwapSpaceError, match="all 2 swap directories together are too small"):
            store.reserve(64 * MIB, 0)
        assert store.stats()["reserved_bytes"] == 24 * MIB
