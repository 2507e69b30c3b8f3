"""One contestant of benchmarks/activations.py: trains a GPT in this process, a step when asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import Json, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


def prepare(settings: Json) -> tuple[Json, Callable[[Json], Json], Callable[[], None]]:
    """Make the model; settings: mode, layers, width, heads, sequence, batch, threads and policy."""
    import gpt
    import torch

    import offload

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    sequence, batch = settings["sequence"], settings["batch"]
    model = gpt.GPT(
        gpt.GPTConfig(settings["layers"], settings["width"], settings["heads"], context=sequence)
    )
    params = sum(p.numel() for p in model.parameters())
    wrapped = settings["mode"] != "plain"
    if wrapped:
        budget = offload.Budget(host=settings["host_bytes"])
        more = {} if settings["mode"] == "keep" else {"activation_bytes": settings["room_bytes"]}
        policy = offload.Policy(
            budget=budget, swap_dir=settings["swap_dir"], activations=settings["mode"], **more
        )
        offload.wrap(model, policy)
    optimizer = offload.AdamW(model.parameters(), lr=1e-4)
    data = torch.Generator().manual_seed(1)

    def answer(request: Json) -> Json:
        before = _moved(model) if wrapped else {}
        windows = torch.randint(256, (batch, sequence + 1), generator=data)
        begun = time.perf_counter()
        loss = gpt.loss_of(model, windows)
        forward = time.perf_counter() - begun
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - begun
        found: Json = {
            "seconds": seconds,
            "forward_seconds": forward,
            "loss": loss.item(),
            "peak_rss_bytes": _peak_rss(),
            "notes": [],
        }
        if wrapped:
            after = _moved(model)
            found |= {key: after[key] - before[key] for key in after}
            found["notes"] = list(offload.report(model).notes)
        return found

    def _moved(model: torch.nn.Module) -> dict[str, Any]:
        report = offload.report(model).as_dict()
        return {
            key: report[key]
            for key in (
                *("activation_saved_bytes", "activation_read_bytes", "activation_write_bytes"),
                "stall_seconds",
            )
        }

    return {"params": params}, answer, lambda: None


def _peak_rss() -> int:
    """The highest resident memory of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    serve(prepare)
