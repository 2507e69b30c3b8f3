"""A durable store as Python sees it; one that is killed reopens as some commit left it, whole."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from durable_writer import BLOCK, SIZES, content, version

from offload import OffloadError, SwapIOError, _native

STORES = 40
KILLS_EACH = 5


class Writers:
    """The process that durable_writer.py describes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("durable_writer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_and_kill(self, seed: int, first: int, folders: list[str], after: float) -> list[str]:
        """Let a writer run for `after` seconds; return what it printed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(seed, first, *folders, file=self.process.stdin, flush=True)
        lines: list[str] = []
        killed = False
        for raw in self.process.stdout:
            line = raw.strip()
            if line == "ended":
                assert killed, f"the writer ended by itself, after {lines}"
                return lines
            lines.append(line)
            if line.startswith("pid"):
                time.sleep(after)
                os.kill(int(line.split()[1]), signal.SIGKILL)
                killed = True
        raise AssertionError(f"durable_writer.py ended, after {lines}")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture
def writers() -> Iterator[Writers]:
    writers = Writers()
    yield writers
    writers.close()


def reopen(folders: list[str]) -> _native.SwapStore:
    return _native.SwapStore.open_durable(folders, "model", False, block_bytes=BLOCK)


def held(store: _native.SwapStore) -> list[np.ndarray | None]:
    """The bytes of each key's object; None where nothing was written or there is no object."""
    arena = _native.HostArena(2 * max(SIZES) + 8192)
    found: list[np.ndarray | None] = []
    for key, nbytes in enumerate(SIZES):
        thing = store.find(f"key{key}")
        if thing is None or not store.written(thing, 0):
            found.append(None)
            continue
        assert store.nbytes(thing) == nbytes
        lease = arena.allocate(nbytes)
        store.read(thing, lease, nbytes).wait()
        found.append(np.frombuffer(memoryview(lease), np.uint8)[:nbytes].copy())
        del lease
    return found


def is_commit(found: list[np.ndarray | None], seed: int, number: int) -> bool:
    """Whether `found` is what commit `number` holds, no more, no less, no older."""
    for key, data in enumerate(found):
        expected = version(seed, number, key) if number >= 0 else -1
        if (data is None) != (expected < 0):
            return False
        if data is not None and not np.array_equal(data, content(seed, key, expected)):
            return False
    return True


def test_killed_at_random_moments(writers: Writers, tmp_path: Path) -> None:
    """Each reopening gives the last commit, or the one that was under way."""
    moments = random.Random(1)
    kills = under_way = commits = before_first = 0
    for seed in range(STORES):
        folders = [str(tmp_path / f"{seed}-{i}") for i in range(1 + seed % 2)]
        for folder in folders:
            Path(folder).mkdir()
        last = -1
        for _ in range(KILLS_EACH):
            lines = writers.run_and_kill(seed, last + 1, folders, moments.uniform(0, 0.12))
            kills += 1
            begun = [int(line.split()[1]) for line in lines if line.startswith("begin")]
            done = [int(line.split()[1]) for line in lines if line.startswith("done")]
            least = done[-1] if done else last
            most = begun[-1] if begun else last
            if not (Path(folders[0]) / "model.journal").exists():
                assert "open" not in lines
                assert last == -1
                continue
            store = reopen(folders)
            found = held(store)
            store.close()
            matches = [n for n in range(least, most + 1) if is_commit(found, seed, n)]
            assert matches, f"seed {seed}: none of the commits {least} to {most} is in the store"
            under_way += most > least
            before_first += not done
            commits += len(done)
            last = matches[-1]
    assert kills == STORES * KILLS_EACH
    # Otherwise the moments were not those that matter.
    assert under_way > kills // 20
    assert before_first > kills // 20
    assert commits > kills
    print(f"{kills} kills, {under_way} within a commit, {before_first} before one, {commits} done")


def test_commit_and_reopen(tmp_path: Path) -> None:
    folder = str(tmp_path)
    store = _native.SwapStore.open_durable(folder, "model", True)
    assert store.durable
    assert not _native.SwapStore(folder).durable
    store.reserve(4 * 2**20, 4 * 2**20)
    thing = store.create(1000, "weights")
    assert (store.find("weights"), store.find("none"), store.keys()) == (thing, None, ["weights"])
    arena = _native.HostArena(8192)
    lease = arena.allocate(1000)
    np.frombuffer(memoryview(lease), np.uint8)[:1000] = 7
    store.write(thing, lease, 1000).wait()
    with pytest.raises(SwapIOError, match="in use") as caught:
        _native.SwapStore.open_durable(folder, "model", False)
    assert caught.value.errno == errno.EWOULDBLOCK
    store.commit()
    store.close()
    with pytest.raises(SwapIOError, match="reopen it or name another") as caught:
        _native.SwapStore.open_durable(folder, "model", True)
    assert caught.value.errno == errno.EEXIST
    store = _native.SwapStore.open_durable(folder, "model", False)
    found = store.find("weights")
    assert found is not None
    np.frombuffer(memoryview(lease), np.uint8)[:] = 0
    store.read(found, lease, 1000).wait()
    assert (np.frombuffer(memoryview(lease), np.uint8)[:1000] == 7).all()
    store.close()
    with pytest.raises(SwapIOError) as caught:
        _native.SwapStore.open_durable(folder, "other", False)
    assert caught.value.errno == errno.ENOENT


def test_a_scratch_store_cannot_commit(tmp_path: Path) -> None:
    store = _native.SwapStore(str(tmp_path))
    with pytest.raises(OffloadError, match="gone with its process"):
        store.commit()
