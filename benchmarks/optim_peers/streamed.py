"""offload.AdamW on plain parameters, its state on disk but for what the host budget keeps."""

from __future__ import annotations

import time
from collections.abc import Callable

from worker import Answer, Json, serve

import offload
from optim_peers.parameters import LR, WEIGHT_DECAY, disk_bytes, make_parameters, use_threads


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    use_threads(settings["threads"])
    parameters = make_parameters(settings["shapes"])
    policy = offload.Policy(
        budget=offload.Budget(host=settings["host_budget"]), swap_dir=settings["folder"]
    )
    optimizer = offload.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, policy=policy)

    def step(_: Json) -> Json:
        """One step, and the bytes that it read and wrote."""
        before = disk_bytes()
        started = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - started
        read, written = (now - was for now, was in zip(disk_bytes(), before, strict=True))
        return {"seconds": seconds, "read_bytes": read, "written_bytes": written}

    for _ in range(2):  # the first makes the state, the second finds it on disk
        step({})
    return {}, step, lambda: None


if __name__ == "__main__":
    serve(_prepare)
