"""DeepSpeed's ZeRO-3 with the optimizer on NVMe: engine.step() for a model of the same parameters.

Runs in the Python that DeepSpeed is installed in, one rank, on the CPU. The forward and backward of
the model cost next to nothing, and are not timed; nor are the gradients, which DeepSpeed writes to
the disk in the backward. There is no limit on its memory.
"""

from __future__ import annotations

import importlib
import os
import resource
import time
from collections.abc import Callable, Sequence

import torch
from worker import Answer, Json, serve

from optim_peers.parameters import LR, WEIGHT_DECAY, disk_bytes, use_threads

ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


class _Part(torch.nn.Module):
    """One parameter whose gradient is a constant."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape).mul_(0.02))

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        """Adds a thousandth of the sum of the parameter."""
        return total + (self.weight * 1e-3).sum()


def _config(settings: Json) -> Json:
    return {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**30,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": WEIGHT_DECAY}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": settings["sub_group_size"],
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": settings["folder"],
                "pipeline_read": settings["pipelined"],
                "pipeline_write": settings["pipelined"],
                # of a sub-group: parameters, gradients and two moments; with pipelining one that
                # is read ahead and one that is being written too
                "buffer_count": 12 if settings["pipelined"] else 5,
            },
        },
        "aio": {
            "block_size": 2**20,
            "queue_depth": 16,
            "single_submit": False,
            "overlap_events": True,
            "intra_op_parallelism": settings["intra_op_parallelism"],
        },
    }


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    use_threads(settings["threads"])
    os.environ.update(ONE_RANK, MASTER_PORT=str(settings["port"]), DS_ACCELERATOR="cpu")
    deepspeed = importlib.import_module("deepspeed")
    model = torch.nn.Sequential(*map(_Part, settings["shapes"]))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=_config(settings)
    )

    def step(_: Json) -> Json:
        """One step, and the bytes that it read and wrote."""
        engine.backward(engine(torch.zeros(())))
        before = disk_bytes()
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        read, written = (now - was for now, was in zip(disk_bytes(), before, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": seconds,
            "read_bytes": read,
            "written_bytes": written,
            "peak_rss_bytes": peak,
        }

    step({})  # makes the moments
    return {"version": deepspeed.__version__}, step, torch.distributed.destroy_process_group


if __name__ == "__main__":
    serve(_prepare)
