"""Faults that the kernel itself injects: filtered calls, limits of the process, a file cut short.

Whatever fails is named by the right exception, and what was stored before is still there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from offload import CorruptionError, SwapIOError, _native

MIB = 2**20
BLOCK = 2**16
IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427  # on every architecture

Arena = _native.HostArena
Store = _native.SwapStore


def content(seed: int, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def put(store: Store, thing: int, arena: Arena, seed: int) -> None:
    nbytes = store.nbytes(thing)
    lease = arena.allocate(nbytes)
    np.frombuffer(memoryview(lease), np.uint8)[:nbytes] = content(seed, nbytes)
    store.write(thing, lease, nbytes).wait()


def holds(store: Store, thing: int, arena: Arena, seed: int) -> bool:
    nbytes = store.nbytes(thing)
    lease = arena.allocate(nbytes)
    store.read(thing, lease, nbytes).wait()
    return np.array_equal(
        np.frombuffer(memoryview(lease), np.uint8)[:nbytes], content(seed, nbytes)
    )


class Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


def refuse(calls: list[int], err: int) -> int:
    """Have `calls` of this thread, and of those that it starts, fail; return 0 or an errno."""
    load, equal, give = 0x20, 0x15, 0x06
    rows = [(load, 0, 0, 0)]
    for call in calls:
        rows += [(equal, 0, 1, call), (give, 0, 0, 0x00050000 | err)]
    rows.append((give, 0, 0, 0x7FFF0000))
    program = Program(len(rows), (Instruction * len(rows))(*rows))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
        return ctypes.get_errno()
    if libc.prctl(seccomp, by_filter, ctypes.byref(program), 0, 0) != 0:
        return ctypes.get_errno()
    return 0


def in_a_thread_without(calls: list[int], err: int, run: Callable[[], None]) -> None:
    """Run in a thread under a seccomp filter, which ends with the thread."""

    def body() -> int:
        refused = refuse(calls, err)
        if refused == 0:
            run()
        return refused

    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(body).result(60)
    if refused != 0:
        pytest.skip(f"no seccomp filter: {os.strerror(refused)}")


@pytest.fixture
def has_ring(tmp_path: Path) -> None:
    with closing(Store(str(tmp_path))) as store:
        if store.engine != "io_uring":
            pytest.skip(store.engine_reason)


def check_round_trips(store: Store) -> None:
    arena = Arena(4 * MIB)
    store.reserve(MIB, MIB)
    thing = store.create(MIB - 100)
    for seed in range(3):
        put(store, thing, arena, seed)
        assert holds(store, thing, arena, seed)


@pytest.mark.usefixtures("has_ring")
@pytest.mark.parametrize("err", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("call", [IO_URING_SETUP, IO_URING_ENTER])
def test_without_io_uring_threads_serve(call: int, err: int, tmp_path: Path) -> None:
    def run() -> None:
        with closing(Store(str(tmp_path), engine="auto", block_bytes=BLOCK)) as store:
            assert store.engine == "threads"
            assert store.engine_reason.startswith("threads: no io_uring, io_uring_")
            assert f"(errno {err})" in store.engine_reason
            check_round_trips(store)
        with pytest.raises(SwapIOError) as caught:
            Store(str(tmp_path), engine="io_uring")
        assert caught.value.errno == err

    in_a_thread_without([call], err, run)


@pytest.mark.usefixtures("has_ring")
def test_a_ring_works_without_registered_memory(tmp_path: Path) -> None:
    def run() -> None:
        with closing(Store(str(tmp_path), engine="auto", block_bytes=BLOCK)) as store:
            assert store.engine == "io_uring"
            refused = "io_uring_register_buffers: Operation not permitted"
            assert f"{refused} (errno {errno.EPERM})" in store.engine_reason
            check_round_trips(store)

    in_a_thread_without([IO_URING_REGISTER], errno.EPERM, run)


# Limits are of a whole process: each is set in one that runs a function of this file.
LIMITED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_faults
getattr(test_faults, sys.argv[2])(sys.argv[3])
"""


def run_limited(name: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(Path(__file__).parent), name, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def few_file_descriptors(folder: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Store(folder).close()
    used = os.dup(0)
    os.close(used)
    failed = 0
    for spare in range(16):
        error = None
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
        try:
            Store(folder).close()
        except SwapIOError as caught:
            error = caught
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not list(Path(folder).iterdir())
        if error is None:
            break
        failed += 1
        assert (error.errno, error.filename) == (errno.EMFILE, folder)
        assert "ulimit -n" in str(error)
    assert 0 < failed < 8
    with closing(Store(folder, block_bytes=BLOCK)) as store:
        check_round_trips(store)


def test_too_few_file_descriptors(tmp_path: Path) -> None:
    """The error says what to do, nothing is left behind, and it works once the limit is raised."""
    run_limited("few_file_descriptors", tmp_path)


def limit_file_size(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def small_files(folder: str) -> None:
    for engine in ("auto", "threads"):
        arena = Arena(4 * MIB)
        store = Store(folder, engine=engine, block_bytes=BLOCK)
        limit_file_size(MIB)
        with pytest.raises(SwapIOError) as refused:
            store.reserve(2 * MIB, 2 * MIB)
        assert (refused.value.errno, refused.value.filename) == (errno.EFBIG, folder)
        assert store.stats()["reserved_bytes"] == 0
        limit_file_size(resource.RLIM_INFINITY)
        store.reserve(2 * MIB, 2 * MIB)
        things = [store.create(MIB), store.create(MIB)]
        for seed, thing in enumerate(things):
            put(store, thing, arena, seed)
        free = store.stats()["free_bytes"]
        assert free == 2 * MIB
        limit_file_size(2 * MIB + BLOCK + 3 * 4096)  # within the second of the free blocks
        for seed, thing in enumerate(things):
            with pytest.raises(SwapIOError) as failed:
                put(store, thing, arena, 7)
            assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, folder)
            del failed  # its traceback refers to the lease
            assert holds(store, thing, arena, seed)
            assert store.stats()["free_bytes"] == free
        assert store.stats()["continued"] > 0
        limit_file_size(resource.RLIM_INFINITY)
        for seed, thing in enumerate(things):
            put(store, thing, arena, 7 + seed)
            assert holds(store, thing, arena, 7 + seed)
        assert store.stats()["free_bytes"] == free
        assert arena.usage()["in_use"] == 0
        store.close()


def test_a_file_size_limit(tmp_path: Path) -> None:
    """A write that the kernel cuts short and then refuses leaves the previous version."""
    run_limited("small_files", tmp_path)


def swap_files(folder: Path) -> list[Path]:
    """Descriptors of the data files, named or not, in `folder`."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            target = fd.readlink()
            if target.parent == folder and not target.name.endswith(".journal"):
                found.append(fd)
    return found


@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("durable", [False, True])
def test_a_truncated_file(durable: bool, engine: str, tmp_path: Path) -> None:
    """What was cut off is corrupt, what is left is right, and what is written again is whole."""
    arena, nbytes, folder = Arena(4 * MIB), 4 * BLOCK, str(tmp_path)
    opened = (
        Store.open_durable(folder, "model", True, engine, block_bytes=BLOCK)
        if durable
        else Store(folder, engine, block_bytes=BLOCK)
    )
    with closing(opened) as store:
        store.reserve(2 * nbytes, nbytes)
        things = [store.create(nbytes, key if durable else "") for key in ("first", "second")]
        for seed, thing in enumerate(things):
            put(store, thing, arena, seed)
        (file,) = swap_files(tmp_path)
        os.truncate(file, (4 + durable) * BLOCK)  # slots are taken from the first on
        with pytest.raises(CorruptionError, match="too early") as caught:
            holds(store, things[1], arena, 1)
        assert isinstance(caught.value, OSError)
        assert folder in str(caught.value)
        assert holds(store, things[0], arena, 0)
        put(store, things[1], arena, 2)
        assert holds(store, things[1], arena, 2)
