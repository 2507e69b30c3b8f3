"""Processes that keep a durable store under load until they are killed.

Reads lines "SEED FIRST FOLDER..." and for each forks a child that opens or creates the store in the
folders and commits number FIRST, FIRST + 1, ... for ever. The child prints "open", "begin N" before
commit N and "done N" after it. "pid N" is printed ahead of that, "ended" after the child's death.
What a commit holds follows from SEED and its number alone, so that whoever kills can check it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16
SIZES = (1, BLOCK, BLOCK + 1, 3 * BLOCK - 7, 4 * BLOCK, 5 * BLOCK)
"""Bytes of each key's object."""


def load_native() -> ModuleType:
    """Return offload._native without the package, and without torch, which takes seconds."""
    folder = Path(__file__).resolve().parents[3] / "offload"
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    path = next(p for s in suffixes for p in [folder / f"_native{s}"] if p.exists())
    spec = importlib.util.spec_from_file_location("offload._native", path)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native


def say(*words: object) -> None:
    """Print a line in one piece, so that a kill cannot leave half of one."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def version(seed: int, commit: int, key: int) -> int:
    """Return the version of `key` in a commit; -1: not written yet. Not all change each time."""
    changed = [c for c in range(max(0, commit - 8), commit + 1) if (c * 7 + key * 3 + seed) % 4]
    return changed[-1] if changed else -1


def content(seed: int, key: int, version: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a version."""
    random = np.random.default_rng([seed, key, version])
    return random.integers(0, 256, SIZES[key], dtype=np.uint8)


def write(native: ModuleType, seed: int, first: int, folders: list[str]) -> None:
    """Write and commit until killed."""
    create = not (Path(folders[0]) / "model.journal").exists()
    store = native.SwapStore.open_durable(folders, "model", create, block_bytes=BLOCK)
    live = sum(store.footprint(n) for n in SIZES)
    store.reserve(live, 4 * live)
    arena = native.HostArena(16 << 20)
    objects = [store.find(f"key{k}") or store.create(n, f"key{k}") for k, n in enumerate(SIZES)]
    say("open")
    commit = first
    while True:
        transfers = []
        for key, thing in enumerate(objects):
            new = version(seed, commit, key)
            if new < 0 or (commit > first and new == version(seed, commit - 1, key)):
                continue
            lease = arena.allocate(SIZES[key])
            np.frombuffer(memoryview(lease), np.uint8)[: SIZES[key]] = content(seed, key, new)
            transfers.append(store.write(thing, lease, SIZES[key]))
        for transfer in transfers:
            transfer.wait()
        say("begin", commit)
        store.commit()
        say("done", commit)
        commit += 1


def main() -> None:
    """Serve until the end of the input."""
    native = load_native()
    for line in sys.stdin:
        seed, first, *folders = line.split()
        child = os.fork()
        if child == 0:
            write(native, int(seed), int(first), folders)
        say("pid", child)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
