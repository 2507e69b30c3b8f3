"""Training steps of a wrapped model of many equal layers, in memory that is capped after the wrap.

Everything about the step is ordinary: a forward, a backward, an optimizer whose step() returns when
all is updated. One layer's update is done again by torch's AdamW, from the same gradients.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from worker import Answer, Json, serve

import offload
from optim_peers.parameters import LR, WEIGHT_DECAY, use_threads

BATCH = 16
RESET_PEAK_RSS = "5"
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
"""For the environment: what the wrap frees goes back to the system instead of to glibc's heap."""


class Tower(nn.Module):
    """Residual layers of one width."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, width) to the same shape."""
        for layer in self.layers:
            x = x + 0.1 * torch.relu(layer(x))
        return x


class Steps:
    """The wrapped model, its optimizer, and the layer that torch updates too."""

    def __init__(self, layers: int, width: int, host_budget: int, folder: str) -> None:
        torch.manual_seed(0)
        tower = Tower(layers, width)
        self._watched = tower.get_parameter(f"layers.{layers // 2}.weight")
        self._copy = nn.Parameter(self._watched.detach().clone())
        self._torch = torch.optim.AdamW(
            [self._copy], lr=LR, weight_decay=WEIGHT_DECAY, foreach=False
        )
        policy = offload.Policy(
            budget=offload.Budget(host=host_budget), swap_dir=folder, lazy_step=False
        )
        self._model = offload.wrap(tower, policy)
        self._optimizer = offload.AdamW(self._model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        self._inputs = torch.randn(BATCH, width)

    def about(self) -> Json:
        """Sizes, as the plan has them."""
        found = offload.report(self._model).as_dict()
        return {"params": found["params"], "plan": found["plan"]}

    def step(self) -> Json:
        """One step: seconds of its halves, bytes of the second one, and the peak so far."""
        started = time.perf_counter()
        self._model(self._inputs).square().mean().backward()
        computed = time.perf_counter()
        self._copy.grad = torch.clone(_gradient_of(self._watched))
        self._torch.step()
        before = self._moved()
        begun = time.perf_counter()
        self._optimizer.step()
        ended = time.perf_counter()
        after = self._moved()
        self._optimizer.zero_grad()
        return {
            "forward_backward_s": computed - started,
            "step_s": ended - begun,
            "read_bytes": after[0] - before[0],
            "written_bytes": after[1] - before[1],
            "peak_rss_bytes": _peak_rss(),
            "arena_peak_bytes": offload.report(self._model).as_dict()["arena_peak_bytes"],
            "different": int(torch.ne(self._watched, self._copy).sum()),
        }

    def _moved(self) -> tuple[int, int]:
        found = offload.report(self._model).as_dict()
        return found["disk_read_bytes"], found["disk_write_bytes"]


def _gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise SystemExit("the backward left no gradient")
    return parameter.grad


def _peak_rss() -> int:
    """The highest resident memory since it was reset, in bytes (ru_maxrss knows no reset)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    use_threads(settings["threads"])
    steps = Steps(
        settings["layers"], settings["width"], settings["host_budget"], settings["folder"]
    )

    def answer(request: Json) -> Json:
        """A step; or with request["cap"], that limit on RLIMIT_DATA and the peak forgotten."""
        if "cap" not in request:
            return steps.step()
        cap = request["cap"]
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
        Path("/proc/self/clear_refs").write_text(RESET_PEAK_RSS, encoding="ascii")
        return {"peak_rss_bytes": _peak_rss()}

    return steps.about(), answer, lambda: None


if __name__ == "__main__":
    serve(_prepare)
