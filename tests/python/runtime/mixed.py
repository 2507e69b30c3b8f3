"""Mixed precision spelled out in plain PyTorch, to compare Policy(param_dtype=...) with.

The model is in 16 bits; a list of fp32 masters is what torch's AdamW updates; each step ends with
copying them back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training as t
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import offload

Forward = Callable[[nn.Module, int], torch.Tensor]
"""Returns the loss of step number i."""


class Odd(nn.Module):
    """A block with parameters of several dtypes, frozen ones, buffers, and two shapes of norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 2 * width)
        self.batch_norm = nn.BatchNorm1d(2 * width)
        self.frozen = nn.Linear(2 * width, 2 * width).requires_grad_(False)
        self.narrow = nn.Linear(2 * width, width).to(torch.bfloat16)
        codes = torch.randint(-99, 99, (width, width), dtype=torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.frozen(nn.functional.gelu(self.batch_norm(self.mix(self.norm(x)))))
        y = self.narrow(h.to(self.narrow.weight.dtype)).to(x.dtype)
        return x + y @ self.codes.to(x.dtype) / 1024 + self.shift.to(x.dtype)


class Odds(nn.Module):
    def __init__(self, layers: int = 6, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(32, width)
        self.embed.weight.requires_grad_(False)
        self.blocks = nn.ModuleList(Odd(width) for _ in range(layers))
        self.head = nn.Linear(width, 32, bias=False)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        y: torch.Tensor = self.head(h * self.scale)
        return y


class Fp32Odds(Odds):
    """Without what is not fp32: for fp16, which refuses other narrow parameters."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.narrow.float()


def odd_loss(model: nn.Module, step: int) -> torch.Tensor:
    """fp32 inputs, as an unchanged loop has them; the plain model gets them in its own dtype."""
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(step))
    y = model(x.to(model.dtype) if isinstance(model, Narrow) else x)
    return (y.float() - x).square().mean()


class Narrow(nn.Module):
    """A plain model in `dtype`, as its masters are: the reference."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, **adamw: Any) -> None:
        super().__init__()
        self.inner, self.dtype = model, dtype
        norms = (m for m in model.modules() if isinstance(m, _NormBase))
        kept = {p for m in norms for p in m.parameters()}
        self.given = {p: p.detach().clone() for p in model.parameters()}
        for param in model.parameters():
            if param.dtype is torch.float32 and param not in kept:
                param.data = param.data.to(dtype)
        self.masters = {
            p: self.given[p].float() for p in model.parameters() if p.requires_grad and narrow(p)
        }
        params = [self.masters.get(p, p) for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(params, foreach=False, fused=False, **adamw)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def step(self, factor: float = 1.0) -> None:
        for param, master in self.masters.items():
            master.grad = None if param.grad is None else param.grad.float() * factor
        self.optimizer.step()
        with torch.no_grad():
            for param, master in self.masters.items():
                param.copy_(master)
        self.inner.zero_grad()

    def full_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint of the fp32 model would have."""
        state = dict(self.inner.state_dict())
        for name, param in self.inner.named_parameters(remove_duplicate=False):
            if param in self.masters and self.given[param].dtype is torch.float32:
                state[name] = self.masters[param]
            elif not param.requires_grad:
                state[name] = self.given[param]
        return state


def narrow(param: torch.Tensor) -> bool:
    return param.dtype in (torch.bfloat16, torch.float16)


def policy_for(make: t.Model, folder: Path, budget: int | None = None, **options: Any) -> Any:
    """The smallest budget that would do, with released memory poisoned."""
    options = {
        "debug": True,
        "io_block_bytes": 1 << 16,
        "max_unit_bytes": 1 << 30,
        "calibrate_disk": False,
        "param_dtype": torch.bfloat16,
        **options,
    }
    budget = budget or t.least_budget(make, **options)
    return offload.Policy(offload.Budget(host=budget), swap_dir=folder, **options)


def seeded(make: t.Model) -> nn.Module:
    torch.manual_seed(0)
    return make()


def assert_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        assert torch.equal(found[name], value), name
