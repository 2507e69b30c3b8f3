"""A GPT that is made, wrapped and trained under a cap on the process that stands from the start.

Everything is what a user writes: deferred_init, wrap, offload.AdamW, an ordinary loop. One weight's
updates are done again by torch's AdamW, from the same gradients.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from gpt import GPT, GPTConfig, loss_of
from worker import Answer, Json, serve

import offload

LR = 2e-5
RESET_PEAK_RSS = "5"
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
"""For the environment: what is freed goes back to the system instead of to glibc's heap."""


class Training:
    """The model, and what is asked of it one phase after the other."""

    def __init__(self, config: GPTConfig, host_budget: int, folder: str) -> None:
        self._config = config
        self._folder = folder
        self._phases: dict[str, Callable[[], float | None]] = {
            "make": self.make,
            "wrap": self.wrap,
            "step": self.step,
            "evaluate": self.evaluate,
        }
        self._policy = offload.Policy(offload.Budget(host=host_budget), swap_dir=folder)
        self._model: GPT
        self._optimizer: torch.optim.Optimizer
        self._watched: nn.Parameter
        self._copy: nn.Parameter
        self._torch: torch.optim.Optimizer
        self._windows = torch.randint(
            config.vocabulary, (1, config.context + 1), generator=torch.Generator().manual_seed(1)
        )

    def make(self) -> None:
        """Initialise the model; its parameters go to a file as they are made."""
        torch.manual_seed(0)
        with offload.deferred_init(swap_dir=self._folder):
            self._model = GPT(self._config)

    def wrap(self) -> None:
        """Move it to where the policy wants it, and make the optimizer."""
        offload.wrap(self._model, self._policy)
        self._optimizer = offload.AdamW(self._model.parameters(), lr=LR)
        self._watched = self._model.get_parameter(f"blocks.{self._config.layers // 2}.proj.weight")
        self._copy = nn.Parameter(self._watched.clone().detach())
        self._torch = torch.optim.AdamW([self._copy], lr=LR, foreach=False)

    def step(self) -> float:
        """One optimizer step; the loss before it."""
        loss = loss_of(self._model, self._windows)
        loss.backward()  # type: ignore[no-untyped-call]
        self._copy.grad = _gradient_of(self._watched)
        self._torch.step()
        self._torch.zero_grad()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def evaluate(self) -> float:
        """A forward, which finishes all updates; the loss."""
        with torch.no_grad():
            return loss_of(self._model, self._windows).item()

    def run(self, phase: str) -> Json:
        """A phase by name, and what it took."""
        Path("/proc/self/clear_refs").write_text(RESET_PEAK_RSS, encoding="ascii")
        before, started = self._moved(), time.perf_counter()
        loss = self._phases[phase]()
        seconds = time.perf_counter() - started
        after = self._moved()
        return {
            "phase": phase,
            "seconds": seconds,
            "loss": loss,
            "read_bytes": after[0] - before[0],
            "written_bytes": after[1] - before[1],
            "disk_bytes": self._on_disk(),
            "peak_rss_bytes": _peak_rss(),
        }

    def about(self) -> Json:
        """Sizes, once the model is wrapped, and whether the watched weight is torch's."""
        found = offload.report(self._model).as_dict()
        return {
            "params": found["params"],
            "arena_peak_bytes": found["arena_peak_bytes"],
            "different": int(torch.ne(self._watched, self._copy).sum()),
            "stalls": found["stalls"],
        }

    def _moved(self) -> tuple[int, int]:
        """Bytes that the swap store read and wrote."""
        if not hasattr(self, "_optimizer"):
            return 0, 0
        found = offload.report(self._model).as_dict()
        return found["disk_read_bytes"], found["disk_write_bytes"]

    def _on_disk(self) -> int:
        """Bytes that this process's unnamed files take up in the folder."""
        total = 0
        inodes = set()
        for link in list(Path("/proc/self/fd").iterdir()):
            if link.is_symlink() and str(link.readlink()).startswith(self._folder):
                found = link.stat()
                if found.st_nlink == 0 and found.st_ino not in inodes:
                    inodes.add(found.st_ino)
                    total += found.st_blocks * 512
        return total


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise SystemExit("the backward left no gradient")
    return parameter.grad.clone()


def _peak_rss() -> int:
    """The highest resident memory since it was reset, in bytes (ru_maxrss knows no reset)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def _prepare(settings: Json) -> tuple[Json, Answer, Callable[[], None]]:
    torch.set_num_threads(settings["threads"])
    cap = settings["cap"]
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    training = Training(
        GPTConfig(**settings["config"]), settings["host_budget"], settings["folder"]
    )

    def answer(request: Json) -> Json:
        """The phase that is named, or what there is to say about all."""
        return training.about() if request["phase"] == "about" else training.run(request["phase"])

    return {}, answer, lambda: None


if __name__ == "__main__":
    serve(_prepare)
