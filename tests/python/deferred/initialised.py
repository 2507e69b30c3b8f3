"""Modules that initialise their parameters in every way that models do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


class Scaled(nn.Module):
    """Parameters made from expressions, in place, through ``.data`` and by indices."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(300, 200) * 0.02)
        self.uniform = nn.Parameter(torch.empty(200, 300))
        self.uniform.data.uniform_(-0.1, 0.1)
        self.table = nn.Embedding(500, 100, padding_idx=3)
        with torch.no_grad():
            self.table.weight[7].fill_(0)
            self.table.weight[10:20, ::2] = 1.5
        self.joined = nn.Parameter(torch.cat([torch.rand(100, 200), torch.ones(100, 200)]))
        self.replaced = nn.Parameter(torch.zeros(200, 200))
        self.replaced.data = torch.rand(200, 200).t()


class Decided(nn.Module):
    """What is drawn next depends on values that were drawn."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.empty(400, 300)
        nn.init.normal_(weight)
        while weight.abs().max().item() > 4.2:
            weight[weight.abs() > 4.2] = torch.randn(int((weight.abs() > 4.2).sum()))
        self.weight = nn.Parameter(weight)
        self.count = nn.Parameter(torch.rand(int(weight.sum().abs().item()) % 7 + 200, 200))


class Initialised(nn.Module):
    """The functions of nn.init."""

    def __init__(self) -> None:
        super().__init__()
        functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
            nn.init.trunc_normal_,
            nn.init.orthogonal_,
            nn.init.kaiming_normal_,
            nn.init.xavier_uniform_,
            nn.init.eye_,
            lambda w: nn.init.sparse_(w, 0.5),
            lambda w: nn.init.dirac_(w.view(200, 150, 1)),
        ]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(200, 150)) for _ in functions)
        with torch.no_grad():
            for function, weight in zip(functions, self.weights, strict=True):
                function(weight)


class Buffered(nn.Module):
    """Buffers computed from one another, large and small, one of them not saved."""

    inverse: torch.Tensor
    table: torch.Tensor
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)
        self.register_buffer("inverse", 1e4 ** (-torch.arange(0, 128, 2) / 128), persistent=False)
        self.register_buffer("table", torch.outer(torch.arange(512.0), self.inverse).cos())
        self.register_buffer("mask", torch.triu(torch.full((512, 512), -math.inf), diagonal=1))
        self.norm = nn.BatchNorm1d(128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.linear(x) + self.table[: len(x)].repeat(1, 2))
        return self.mask[: len(x), : len(x)].exp() @ y


class Tied(nn.Module):
    """One parameter under two names, and one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 128)
        self.blocks = nn.ModuleList([nn.Linear(128, 256) for _ in range(3)])
        self.blocks.append(self.blocks[0])
        self.head = nn.Linear(128, 300, bias=False)
        self.head.weight = self.embed.weight


class HalfInside(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 256))
        self.to(torch.bfloat16)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(200, 300),
    "lstm": lambda: nn.LSTM(100, 128, num_layers=2, bidirectional=True, proj_size=32),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(64, 64, 3), nn.ConvTranspose1d(64, 64, 5), nn.BatchNorm2d(64)
    ),
    "channels last": lambda: nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last),
    "attention": lambda: nn.MultiheadAttention(256, 4, kdim=64, vdim=64, add_bias_kv=True),
    "transformer": lambda: nn.Transformer(128, 4, 2, 2, 256, batch_first=True),
    "bilinear": lambda: nn.Bilinear(40, 50, 60),
    "double": lambda: nn.Linear(200, 200, dtype=torch.float64),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(200, 300)),
    "no gradient": lambda: nn.Linear(200, 300).requires_grad_(False),
    "scaled": Scaled,
    "decided": Decided,
    "initialised": Initialised,
    "buffered": Buffered,
    "tied": Tied,
    "half": HalfInside,
}
