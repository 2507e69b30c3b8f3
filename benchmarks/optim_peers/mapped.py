"""torch's AdamW with its state in a mapped file: the kernel's paging instead of a runtime.

Parameters and gradients are ordinary memory, both moments of a parameter lie side by side in the
file. What the page cache can keep of it is limited by the cgroup that this process is started in.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

import torch
from worker import Answer, Json, serve

from optim_peers.parameters import LR, WEIGHT_DECAY, disk_bytes, make_parameters, use_threads

CHUNK = 4 * 2**20


def _written_file(folder: str, nbytes: int) -> int:
    """A descriptor of an unnamed file of `nbytes` zeros that are on the disk."""
    file = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    zeros = bytes(CHUNK)
    for start in range(0, nbytes, CHUNK):
        wanted = min(CHUNK, nbytes - start)
        if os.write(file, zeros[:wanted]) != wanted:
            raise SystemExit(f"{folder}: short write")
    os.fsync(file)
    return file


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    use_threads(settings["threads"])
    parameters = make_parameters(settings["shapes"])
    numel = sum(p.numel() for p in parameters)
    file = _written_file(settings["folder"], 8 * numel)
    mapping = mmap.mmap(file, 8 * numel)
    moments = torch.frombuffer(mapping, dtype=torch.float32)
    state: dict[torch.Tensor, Json] = {}
    start = 0
    for p in parameters:
        views = moments[start : start + 2 * p.numel()].view(2, *p.shape)
        state[p] = {"step": torch.tensor(0.0), "exp_avg": views[0], "exp_avg_sq": views[1]}
        start += 2 * p.numel()
    optimizers = {}
    for fused in (True, False):
        optimizers[fused] = torch.optim.AdamW(
            parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=fused, foreach=False
        )
        optimizers[fused].state.update(state)

    def step(request: Json) -> Json:
        """One step, until it returns; what is still to be written is written before the answer."""
        mapping.madvise(mmap.MADV_SEQUENTIAL if request["sequential"] else mmap.MADV_NORMAL)
        before = disk_bytes()
        started = time.perf_counter()
        optimizers[request["fused"]].step()
        seconds = time.perf_counter() - started
        os.fsync(file)
        read, written = (now - was for now, was in zip(disk_bytes(), before, strict=True))
        return {"seconds": seconds, "read_bytes": read, "written_bytes": written}

    return {}, step, lambda: None


if __name__ == "__main__":
    serve(_prepare)
