"""An optimizer whose state is in memory: offload's, torch's fused AdamW, DeepSpeed's CPU Adam.

Runs in the Python that the optimizer is installed in.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from worker import Answer, Json, serve

from optim_peers.parameters import LR, WEIGHT_DECAY, make_parameters, use_threads


def _make_optimizer(name: str, parameters: list[torch.nn.Parameter], options: Json) -> Any:
    if name == "torch":
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, **options)
    if name == "deepspeed":
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    else:
        adam = importlib.import_module("offload").AdamW
    return adam(parameters, lr=LR, weight_decay=WEIGHT_DECAY, **options)


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    use_threads(settings["threads"])
    parameters = make_parameters(settings["shapes"])
    optimizer = _make_optimizer(settings["optimizer"], parameters, settings["options"])
    optimizer.step()  # makes the state

    def answer(request: Json) -> Json:
        """Seconds of each of request["steps"] steps, after one that is not timed."""
        optimizer.step()
        seconds = []
        for _ in range(request["steps"]):
            started = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    return {}, answer, lambda: None


if __name__ == "__main__":
    serve(_prepare)
