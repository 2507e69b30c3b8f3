"""One contestant: a full fine-tuning step in bf16, of the Llama that all of them train."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from worker import Answer, Json, serve

import offload
from gpu_peers.llama import Llama, LlamaConfig

LR = 1e-5
DTYPE = torch.bfloat16
Made = tuple[nn.Module, torch.optim.Optimizer]


class Run:
    """A model, its optimizer and its data."""

    def __init__(self, settings: Json) -> None:
        self.settings = settings
        self.device = torch.device("cuda", 0) if settings["device"] == "cuda" else None
        self.model, self.optimizer = CONTESTANTS[settings["contestant"]](settings)
        data = torch.Generator().manual_seed(1)
        shape = (settings["batch"], settings["sequence"] + 1)
        tokens = torch.randint(settings["config"]["vocabulary"], shape, generator=data)
        self.tokens = tokens if self.device is None else tokens.to(self.device)

    def step(self) -> Json:
        """One step, to its end on the device; what it took and moved."""
        before = self._report()
        started = time.perf_counter()
        loss = self.model(self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        found = loss.item()
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        after = self._report()
        keys = ("to_device_bytes", "to_host_bytes", "update_seconds", "disk_read_bytes")
        return {
            "seconds": seconds,
            "loss": found,
            **{key: after[key] - before[key] for key in keys if key in after},
            "stalls": {
                why: s - before["stalls"].get(why, 0.0)
                for why, s in after.get("stalls", {}).items()
            },
        }

    def peak(self) -> int | None:
        """The most bytes that torch had of the device."""
        return None if self.device is None else torch.cuda.max_memory_reserved(self.device)

    def _report(self) -> Json:
        if self.settings["contestant"] != "offload":
            return {"stalls": {}}
        return offload.report(self.model).as_dict()


def _config(settings: Json) -> LlamaConfig:
    return LlamaConfig(**settings["config"])


@contextlib.contextmanager
def _in_bf16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _made(settings: Json, device: str) -> Llama:
    torch.manual_seed(0)
    with _in_bf16(), torch.device(device):
        return Llama(_config(settings), settings["sequence"])


def offloaded(settings: Json) -> Made:
    """The model within a device budget; its state in host memory."""
    torch.manual_seed(0)
    with offload.deferred_init(settings["folder"]), _in_bf16():
        model = Llama(_config(settings), settings["sequence"])
    device = settings["device"]
    policy = offload.Policy(
        offload.Budget(host=settings["host_budget"], device=settings["device_budget"]),
        device=device,
        swap_dir=settings["folder"],
    )
    offload.wrap(model, policy)
    return model, offload.AdamW(model.parameters(), lr=LR, state_format="bfloat16")


def plain(settings: Json) -> Made:
    """Everything on the card, moments in bf16."""
    model = _made(settings, "cuda" if settings["device"] == "cuda" else "cpu")
    return model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def fsdp2(settings: Json) -> Made:
    """FSDP2 with CPUOffloadPolicy, on one rank: parameters, gradients and the update on the CPU."""
    from torch import distributed
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.cuda.set_device(0)
    store = (Path(settings["folder"]) / "fsdp2-store").resolve().as_uri()
    distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1)
    model = _made(settings, "cpu")
    for layer in model.layers:
        fully_shard(layer, offload_policy=CPUOffloadPolicy())
    fully_shard(model, offload_policy=CPUOffloadPolicy())
    for name, buffer in list(model.named_buffers(recurse=False)):
        setattr(model, name, buffer.to("cuda"))
    return model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def torchao(settings: Json) -> Made:
    """Parameters on the card, gradients and the optimizer's state on the CPU."""
    model = _made(settings, "cuda")
    make: Any = importlib.import_module("torchao.optim").CPUOffloadOptimizer
    optimizer: torch.optim.Optimizer = make(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=LR, fused=True
    )
    return model, optimizer


CONTESTANTS: dict[str, Callable[[Json], Made]] = {
    "offload": offloaded,
    "plain": plain,
    "fsdp2": fsdp2,
    "torchao": torchao,
}
NEED_CUDA = ("fsdp2", "torchao")


def reason_to_leave_out(name: str, device: str) -> str | None:
    """Why contestant `name` cannot take part on `device`; None when it can."""
    if name in NEED_CUDA and device != "cuda":
        return "needs CUDA: left out"
    if name == "torchao" and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: left out"
    return None


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    torch.set_num_threads(settings["threads"])
    tempfile.tempdir = settings["folder"]
    started = time.perf_counter()
    run = Run(settings)

    def answer(request: Json) -> Json:
        """As many steps as are asked for, one after the other."""
        return {"steps": [run.step() for _ in range(request["steps"])], "peak": run.peak()}

    return {"made_s": time.perf_counter() - started}, answer, lambda: None


if __name__ == "__main__":
    serve(_prepare)
