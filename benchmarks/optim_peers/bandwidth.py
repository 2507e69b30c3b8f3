"""What no update can beat: the time in which its bytes pass through memory, and nothing else.

An update reads the gradient, and reads and writes the parameter and the state. Here the gradient
is added to the parameter (two reads, one write) and the bytes of the state are multiplied in place
(one read, one write): the update's reads and writes, by torch's simplest operators. Memory is in
huge pages where the kernel gives them, which is what the machine can do at its best.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from worker import Answer, Json, serve

from optim_peers.parameters import use_threads

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # of torch's allocator; from the environment


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    use_threads(settings["threads"])
    numel = settings["numel"]
    parameter, gradient = torch.zeros(numel), torch.full((numel,), 1e-3)
    state = torch.zeros(2 * numel)  # of two fp32 moments: the largest that will be asked for

    def answer(request: Json) -> Json:
        """Seconds of passes with request["state_bytes"] of state for each parameter."""
        used = state[: int(numel * request["state_bytes"]) // 4]

        def move() -> float:
            started = time.perf_counter()
            parameter.add_(gradient)
            used.mul_(1.0)
            return time.perf_counter() - started

        move()
        moved = 3 * parameter.nbytes + 2 * used.nbytes
        return {"seconds": [move() for _ in range(request["steps"])], "bytes": moved}

    return {}, answer, lambda: None


if __name__ == "__main__":
    serve(_prepare)
