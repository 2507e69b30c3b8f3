"""SwapStore over two directories, of other block sizes, encrypted, and with cancelled transfers."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from offload import (
    OffloadError,
    SwapIOError,
    TransferCancelledError,
    UnsupportedError,
    _native,
)

MIB = 2**20
KIB64 = 2**16


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    return [str(path) for path in paths]


@pytest.fixture
def arena() -> _native.HostArena:
    return _native.HostArena(48 * MIB)


def as_bytes(lease: _native.Lease, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memoryview(lease), np.uint8)[:nbytes]


def write(
    store: _native.SwapStore, thing: int, arena: _native.HostArena, data: npt.NDArray[np.uint8]
) -> _native.Transfer:
    lease = arena.allocate(data.size)
    as_bytes(lease, data.size)[:] = data
    return store.write(thing, lease, data.size)


def read(store: _native.SwapStore, thing: int, arena: _native.HostArena) -> npt.NDArray[np.uint8]:
    nbytes = store.nbytes(thing)
    lease = arena.allocate(nbytes)
    as_bytes(lease, nbytes)[:] = 0x5A
    store.read(thing, lease, nbytes).wait()
    return as_bytes(lease, nbytes).copy()


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_directories_share_by_rate(
    engine: str, folders: list[str], arena: _native.HostArena
) -> None:
    with closing(_native.SwapStore(folders, engine, block_bytes=KIB64, rates=[3.0, 1.0])) as store:
        store.reserve(8 * MIB, 8 * MIB)
        random, nbytes = np.random.default_rng(0), 8 * MIB
        data = random.integers(0, 256, nbytes, dtype=np.uint8)
        thing = store.create(nbytes)
        write(store, thing, arena, data).wait()
        assert np.array_equal(read(store, thing, arena), data)
        files = store.stats()["files"]
        assert [file["path"] for file in files] == folders
        assert [file["reserved_bytes"] for file in files] == [12 * MIB, 4 * MIB]
        for what in ("bytes_written", "bytes_read"):
            assert [file[what] for file in files] == [6 * MIB, 2 * MIB]


def test_rates_must_fit_the_directories(folders: list[str]) -> None:
    with pytest.raises(OffloadError, match="there are 2 swap directories"):
        _native.SwapStore(folders, rates=[1.0])
    for rates in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(OffloadError, match=f"{folders[1]}: a rate of"):
            _native.SwapStore(folders, rates=rates)
    assert all(not list(Path(folder).iterdir()) for folder in folders)


def test_a_missing_second_directory_is_named(folders: list[str]) -> None:
    missing = str(Path(folders[1]) / "missing")
    with pytest.raises(SwapIOError, match="missing") as caught:
        _native.SwapStore([folders[0], missing])
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, missing)
    assert not list(Path(folders[0]).iterdir())


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory on a filesystem mounted read-only, or for others than root without permission."""
    point = tmp_path / "read-only"
    point.mkdir()
    if os.geteuid() != 0:
        point.chmod(0o500)
        yield point
        return
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", point], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mount: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_read_only_second_directory_is_named(folders: list[str], read_only: Path) -> None:
    with pytest.raises(SwapIOError, match="read-only") as caught:
        _native.SwapStore([folders[0], str(read_only)])
    assert caught.value.errno in (errno.EROFS, errno.EACCES)
    assert caught.value.filename == str(read_only)


def open_encrypted(folders: list[str], encrypt: bool, block_bytes: int) -> _native.SwapStore:
    try:
        return _native.SwapStore(folders, block_bytes=block_bytes, encrypt=encrypt, queue_depth=4)
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("block_bytes", [KIB64, 4 * MIB])
@pytest.mark.parametrize("encrypt", [False, True])
def test_round_trips_of_random_sizes(
    encrypt: bool, block_bytes: int, folders: list[str], arena: _native.HostArena
) -> None:
    random = np.random.default_rng(block_bytes + encrypt)
    most = min(3 * block_bytes, 9 * MIB)
    sizes = [1, block_bytes - 1, block_bytes, block_bytes + 1]
    sizes += [int(n) for n in random.integers(1, most, 6)]
    with closing(open_encrypted(folders, encrypt, block_bytes)) as store:
        assert store.encrypted is encrypt
        live = sum(store.footprint(n) for n in sizes)
        store.reserve(live, store.footprint(most))
        things = [store.create(n) for n in sizes]
        versions: list[npt.NDArray[np.uint8]] = []
        for _ in range(2):  # the second replaces the first
            versions = [random.integers(0, 256, n, dtype=np.uint8) for n in sizes]
            for thing, data in zip(things, versions, strict=True):
                write(store, thing, arena, data).wait()
        for i in random.permutation(len(sizes)):
            assert np.array_equal(read(store, things[i], arena), versions[i]), sizes[i]
        assert store.stats()["failed"] == 0
    assert arena.usage()["in_use"] == 0


def swap_files(folders: list[str]) -> list[Path]:
    """Descriptors of the unnamed files in `folders`."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            if str(fd.readlink().parent) in folders:
                found.append(fd)
    return found


@pytest.mark.parametrize("encrypt", [False, True])
def test_only_an_encrypted_file_hides_the_plaintext(
    encrypt: bool, folders: list[str], arena: _native.HostArena
) -> None:
    secret = b"sixteen letters, a number: 1234."
    data = np.frombuffer(secret * (MIB // len(secret)), np.uint8)
    with closing(open_encrypted(folders, encrypt, KIB64)) as store:
        store.reserve(MIB, MIB)
        thing = store.create(MIB)
        write(store, thing, arena, data).wait()
        files = swap_files(folders)
        assert len(files) == 2
        for file in files:
            content = file.read_bytes()
            assert (secret[:16] in content or secret[16:] in content) is not encrypt
            if encrypt:  # nor does it show which pieces of a tensor are alike
                pieces = [content[i : i + 16] for i in range(0, len(content), 4096)]
                written = [piece for piece in pieces if piece != bytes(16)]
                assert len(written) >= MIB // 4096 // 2
                assert len(set(written)) == len(written)
        assert np.array_equal(read(store, thing, arena), data)


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_a_cancelled_write_leaves_the_previous_version(
    engine: str, folders: list[str], arena: _native.HostArena
) -> None:
    nbytes, count = 4 * MIB, 4
    with closing(
        _native.SwapStore(folders, engine, queue_depth=1, threads=1, block_bytes=KIB64)
    ) as store:
        store.reserve(count * nbytes, count * nbytes)
        things = [store.create(nbytes) for _ in range(count)]
        held = [0] * count
        for thing in things:
            write(store, thing, arena, np.zeros(nbytes, np.uint8)).wait()
        cancelled = 0
        for version in range(1, 6):
            data = np.full(nbytes, version, np.uint8)
            transfers = [write(store, thing, arena, data) for thing in things]
            for transfer in reversed(transfers):
                transfer.cancel()
            for i, transfer in enumerate(transfers):
                try:
                    transfer.wait()
                    held[i] = version
                except TransferCancelledError:
                    cancelled += 1
                assert transfer.done()
            assert arena.usage()["in_use"] == 0
            for thing, expected in zip(things, held, strict=True):
                assert (read(store, thing, arena) == expected).all()
        assert cancelled > 0, "nothing was cancelled: too little was queued"
        stats = store.stats()
        assert stats["free_bytes"] == stats["reserved_bytes"] - count * nbytes


def test_a_cancelled_read_returns_its_lease(folders: list[str], arena: _native.HostArena) -> None:
    nbytes = 4 * MIB
    with closing(_native.SwapStore(folders, queue_depth=1, block_bytes=KIB64)) as store:
        store.reserve(nbytes, nbytes)
        thing = store.create(nbytes)
        data = np.full(nbytes, 7, np.uint8)
        write(store, thing, arena, data).wait()
        cancelled = 0
        for _ in range(5):
            transfers = [store.read(thing, arena.allocate(nbytes), nbytes) for _ in range(4)]
            for transfer in transfers:
                transfer.cancel()
            for transfer in transfers:
                try:
                    transfer.wait()
                except TransferCancelledError:
                    cancelled += 1
            assert arena.usage()["in_use"] == 0
        assert cancelled > 0, "nothing was cancelled: too little was queued"
        assert np.array_equal(read(store, thing, arena), data)
        write(store, thing, arena, data).wait()  # no slot is held by a cancelled read
        stats = store.stats()
        assert stats["free_bytes"] == stats["reserved_bytes"] - nbytes
