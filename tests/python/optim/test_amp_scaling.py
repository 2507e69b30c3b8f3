"""torch.amp.GradScaler with fp16 gradients: unscaled in fp32, on the way to the master."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-1, "momentum": 0.9}),
    ("Adafactor", {"lr": 1e-2}),
]


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(192, 192), nn.Tanh()) for _ in range(6)])


def loss_of(model: nn.Module, step: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(6, 192, generator=torch.Generator().manual_seed(step))
    return (model(x.to(dtype)).float() - x).square().mean()


def explicit(
    name: str, options: dict[str, Any], steps: int, scale: float
) -> tuple[Any, list[float]]:
    """Masters, scale and overflow handled by hand; returns the masters and the scales."""
    model = make()
    masters = [p.detach().clone() for p in model.parameters()]
    model.half()
    params = list(model.parameters())
    optimizer = getattr(torch.optim, name)(masters, foreach=False, **options)
    scales, good = [], 0
    for step in range(steps):
        (loss_of(model, step, torch.float16) * scale).backward()  # type: ignore[no-untyped-call]
        scales.append(scale)
        grads = [p.grad for p in params if p.grad is not None]
        if all(grad.isfinite().all() for grad in grads):
            inverse = torch.tensor(scale).double().reciprocal().float()
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad.float() * inverse
            optimizer.step()
            with torch.no_grad():
                for param, master in zip(params, masters, strict=True):
                    param.copy_(master)
            good += 1
            scale = scale * 2 if good % 2 == 0 else scale
        else:
            scale, good = scale / 2, 0
        model.zero_grad()
    return masters, scales


def scaled(model: nn.Module, optimizer: Any, steps: int, scale: float) -> list[float]:
    """The usual loop."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, backoff_factor=0.5)
    scales = []
    for step in range(steps):
        scaler.scale(loss_of(model, step, torch.float16)).backward()  # type: ignore[no-untyped-call]
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert not hasattr(optimizer, "grad_scale")
    return scales


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_a_wrapped_model(name: str, options: dict[str, Any], lazy: bool, tmp_path: Path) -> None:
    masters, scales = explicit(name, options, 10, 2.0**22)
    policy = offload.Policy(
        offload.Budget(host="3MiB"),
        swap_dir=tmp_path,
        io_block_bytes=1 << 16,
        calibrate_disk=False,
        param_dtype=torch.float16,
        lazy_step=lazy,
        debug=True,
    )
    model = offload.wrap(make(), policy)
    optimizer = getattr(offload.optim, name)(model.parameters(), **options)
    assert scaled(model, optimizer, 10, 2.0**22) == scales
    assert any(b < a for a, b in pairwise(scales)), "no step was skipped"
    assert offload.report(model).plan.spills
    for found, expected in zip(model.state_dict().values(), masters, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("where", ["memory", "slabs"])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_a_plain_fp16_model(name: str, options: dict[str, Any], where: str, tmp_path: Path) -> None:
    model = make().half()
    rounded = [p.detach().clone() for p in model.parameters()]
    policy = None
    if where == "slabs":
        policy = offload.Policy(
            offload.Budget(host="2MiB"), swap_dir=tmp_path, io_block_bytes=1 << 16
        )
    optimizer = getattr(offload.optim, name)(model.parameters(), policy=policy, **options)
    scales = scaled(model, optimizer, 8, 2.0**22)
    assert any(b < a for a, b in pairwise(scales)), "no step was skipped"
    assert all(p.isfinite().all() for p in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(rounded, model.parameters(), strict=True))


def test_what_unscaling_in_fp16_would_lose_arrives() -> None:
    param = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    optimizer = offload.optim.SGD([param], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    tiny = 2.0**-30  # no fp16 number
    scaler.scale((param.float() * tiny).sum()).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    assert (optimizer.state_dict()["state"][0]["master"] == -tiny).all()


def test_fp32_parameters_go_the_usual_way() -> None:
    optimizer = offload.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    assert not optimizer._step_supports_amp_scaling
