"""SwapStore and Transfer as Python sees them, with both I/O engines."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from offload import CorruptionError, OffloadError, SwapIOError, SwapSpaceError, _native

MIB = 2**20
SHM = Path("/dev/shm")
SIZE = 2 * MIB + 4100  # two blocks and a bit


@pytest.fixture(params=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name: str = request.param
    if name == "io_uring":
        try:
            _native.SwapStore(str(tmp_path), name)
        except OffloadError as error:
            pytest.skip(f"io_uring is not offered here: {error}")
    return name


@pytest.fixture
def arena() -> _native.HostArena:
    return _native.HostArena(16 * MIB)


def tensor(lease: _native.Lease) -> torch.Tensor:
    return torch.frombuffer(lease, dtype=torch.uint8)


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8)


def open_store(directory: Path, engine: str = "auto") -> _native.SwapStore:
    store = _native.SwapStore(str(directory), engine)
    store.reserve(8 * MIB, 8 * MIB)
    return store


@pytest.mark.parametrize("demand", [False, True])
def test_round_trip(engine: str, demand: bool, tmp_path: Path, arena: _native.HostArena) -> None:
    store = open_store(tmp_path, engine)
    assert store.engine == engine
    assert store.engine_reason
    thing, out, back = store.create(SIZE), arena.allocate(SIZE), arena.allocate(SIZE)
    assert not store.written(thing, 0)
    for seed in range(3):  # the second and third replace a version
        data = random_bytes(SIZE, seed)
        tensor(out)[:SIZE] = data
        transfer = store.write(thing, out, SIZE, demand)
        transfer.wait()
        assert transfer.done()
        transfer.wait()  # any number of times
        assert store.written(thing, SIZE - 1)
        tensor(back).zero_()
        store.read(thing, back, SIZE, demand=demand).wait()
        assert torch.equal(tensor(back)[:SIZE], data)
    stats = store.stats()
    assert stats["objects"] == 1
    assert stats["failed"] == 0
    assert stats["bytes_written"] >= 3 * SIZE
    assert stats["bytes_read"] >= 3 * SIZE
    store.remove(thing)
    stats = store.stats()
    assert stats["objects"] == 0
    assert stats["free_bytes"] == stats["reserved_bytes"] >= 16 * MIB
    assert list(tmp_path.iterdir()) == [], "the swap file has a name"


def test_transfer_keeps_its_lease(engine: str, tmp_path: Path, arena: _native.HostArena) -> None:
    store = open_store(tmp_path, engine)
    thing, data = store.create(SIZE), random_bytes(SIZE, 5)
    lease = arena.allocate(SIZE)
    tensor(lease)[:SIZE] = data
    transfer = store.write(thing, lease, SIZE)
    del lease
    transfer.wait()
    back = arena.allocate(SIZE)
    store.read(thing, back, SIZE).wait()
    assert torch.equal(tensor(back)[:SIZE], data)
    del transfer
    assert arena.usage()["in_use"] == back.nbytes


def test_footprint(tmp_path: Path) -> None:
    store = _native.SwapStore(str(tmp_path))
    block = _native.SwapStore.default_block_bytes
    assert [store.footprint(n) for n in (1, block, block + 1)] == [
        block,
        block,
        2 * block,
    ]


def test_missing_directory(engine: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(SwapIOError, match="missing") as caught:
        _native.SwapStore(missing, engine)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == missing


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with pytest.raises(SwapIOError) as caught:
        _native.SwapStore(str(path))
    assert caught.value.errno == errno.ENOTDIR
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"content"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SwapIOError) as caught:
        _native.SwapStore(str(tmp_path))
    assert caught.value.errno == errno.EACCES
    assert caught.value.filename == str(tmp_path)


def test_filesystem_without_files() -> None:
    with pytest.raises(SwapIOError) as caught:
        _native.SwapStore("/proc")
    assert caught.value.errno
    assert caught.value.filename == "/proc"


@pytest.mark.skipif(not SHM.is_dir(), reason="there is no /dev/shm")
def test_memory_filesystem_is_noted(engine: str, arena: _native.HostArena) -> None:
    store = open_store(SHM, engine)
    if not store.in_memory:
        pytest.skip("/dev/shm is not a tmpfs here")
    assert "memory" in store.note
    thing, lease, back = store.create(SIZE), arena.allocate(SIZE), arena.allocate(SIZE)
    tensor(lease)[:SIZE] = random_bytes(SIZE, 6)
    store.write(thing, lease, SIZE).wait()
    store.read(thing, back, SIZE).wait()
    assert torch.equal(tensor(back)[:SIZE], tensor(lease)[:SIZE])


def test_disk_without_room(tmp_path: Path) -> None:
    store = _native.SwapStore(str(tmp_path))
    with pytest.raises(SwapSpaceError, match=rf"{tmp_path}.*free") as caught:
        store.reserve(2**50, 2**50)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert store.stats()["reserved_bytes"] == 0
    store.reserve(MIB, MIB)


def test_more_objects_than_reserved(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create(8 * MIB)
    with pytest.raises(SwapSpaceError):
        store.create(1)


def opens_file_in(fd: Path, directory: Path) -> bool:
    """Whether an entry of /proc/self/fd stands for an unnamed file in `directory`."""
    return os.path.lexists(fd) and fd.readlink().parent == directory


def test_corruption_is_found(engine: str, tmp_path: Path, arena: _native.HostArena) -> None:
    store = open_store(tmp_path, engine)
    thing, lease, back = store.create(SIZE), arena.allocate(SIZE), arena.allocate(SIZE)
    tensor(lease)[:SIZE] = random_bytes(SIZE, 7)
    store.write(thing, lease, SIZE).wait()
    (swap_file,) = (fd for fd in Path("/proc/self/fd").iterdir() if opens_file_in(fd, tmp_path))
    with swap_file.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        for offset in range(0, size, MIB):  # whichever slots are live: one bit of each
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    transfer = store.read(thing, back, SIZE)
    with pytest.raises(CorruptionError, match="checksum") as caught:
        transfer.wait()
    assert isinstance(caught.value, OSError)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CorruptionError):
        transfer.wait()  # the outcome stays


def test_misuse(tmp_path: Path, arena: _native.HostArena) -> None:
    store, lease = open_store(tmp_path), arena.allocate(SIZE)
    thing = store.create(SIZE)
    calls = {
        "before it was ever written": lambda: store.read(thing, lease, SIZE),
        "does not exist": lambda: store.remove(thing + 1),
        "swap object of 0 bytes": lambda: store.create(0),
    }
    for message, call in calls.items():
        with pytest.raises(OffloadError, match=message) as caught:
            call()
        assert type(caught.value) is OffloadError
    with pytest.raises(OffloadError):
        store.write(thing, arena.allocate(4096), SIZE)
    with pytest.raises(OffloadError, match=r"aio.*io_uring"):
        _native.SwapStore(str(tmp_path), "aio")
    with pytest.raises(OffloadError, match="queue_depth"):
        _native.SwapStore(str(tmp_path), queue_depth=0)
    with pytest.raises(OffloadError, match="threads"):
        _native.SwapStore(str(tmp_path), "threads", threads=0)


def test_close(engine: str, tmp_path: Path, arena: _native.HostArena) -> None:
    store, lease = open_store(tmp_path, engine), arena.allocate(SIZE)
    thing = store.create(SIZE)
    transfer = store.write(thing, lease, SIZE)
    store.close()
    assert transfer.done(), "close() left something in flight"
    with suppress(OffloadError):  # what no engine had begun may end with "closed"
        transfer.wait()
    for call in (lambda: store.create(1), lambda: store.read(thing, lease, SIZE)):
        with pytest.raises(OffloadError, match="closed"):
            call()
    store.close()
