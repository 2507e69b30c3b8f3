"""Mixtures of experts: each expert is a unit, and one that no token is routed to is not moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from torch import nn
from training import Loop

from offload.runtime.discover import find_units
from offload.runtime.precision import compute_dtypes
from offload.runtime.wrapped import wrapped
from offload.tiers.mover import Mover
from offload.tiers.slab import Slab

EXPERTS = 4


class Mixture(nn.Module):
    """Each token goes to one expert, as its id says."""

    def __init__(self, container: type[nn.Module], width: int) -> None:
        super().__init__()
        experts = [
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(EXPERTS)
        ]
        if container is nn.ModuleDict:
            self.experts = nn.ModuleDict({f"expert_{i}": e for i, e in enumerate(experts)})
        else:
            self.experts = nn.ModuleList(experts)

    def forward(self, x: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts.children()):
            if (route == index).any():
                out[route == index] = expert(x[route == index])
        return out


class Layer(nn.Module):
    def __init__(self, container: type[nn.Module], width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.moe = Mixture(container, width)

    def forward(self, x: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm(x))
        y: torch.Tensor = x + self.moe(x, route)
        return y


class Sparse(nn.Module):
    def __init__(self, container: type[nn.Module] = nn.ModuleList, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Layer(container, width) for _ in range(3))
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, tokens % EXPERTS)
        logits: torch.Tensor = self.head(x)
        return logits


def names(model: nn.Module, limit: int = 1 << 30) -> list[str]:
    return [unit.name for unit in find_units(model, None, limit, compute_dtypes(model, None)).units]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_each_expert_is_a_unit_however_large_units_may_be(container: type[nn.Module]) -> None:
    found = names(Sparse(container))
    keys = list(Sparse(container).layers[0].moe.experts._modules)
    expected = ["embed"]
    for layer in range(3):
        expected += [f"layers.{layer}.norm", f"layers.{layer}.mix"]
        expected += [f"layers.{layer}.moe.experts.{key}" for key in keys]
    assert found == [*expected, "head"]


def test_what_is_not_alike_or_too_small_to_be_moved_alone_stays_in_its_block() -> None:
    assert names(Sparse(width=16)) == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    block = nn.ModuleList([nn.Linear(256, 256), nn.Linear(256, 128)])
    assert names(nn.ModuleList([nn.Sequential(nn.Identity(), nn.Module())])) == []
    outer = nn.Module()
    outer.inner = block  # as a transformer block that lists its attention and its MLP
    assert names(nn.ModuleList([outer])) == ["0"]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_training_a_mixture_is_exact(container: type[nn.Module], tmp_path: Path) -> None:
    small = {"io_block_bytes": "64KiB", "max_unit_bytes": "4MiB"}
    loop = Loop(steps=4, micro_batches=2)

    def make() -> nn.Module:
        return Sparse(container)

    budget = t.least_budget(make, **small)
    t.assert_same(t.plain(make, loop), t.offloaded(make, loop, tmp_path, budget, **small))


def test_an_expert_without_tokens_is_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"io_block_bytes": "64KiB", "max_unit_bytes": "4MiB"}
    model = t.wrapped(Sparse, tmp_path, t.least_budget(Sparse, **small), **small)
    optimizer = t.offload.AdamW(model.parameters())
    read: set[str] = set()
    written: set[str] = set()
    start_read, write_back = Mover._start_read, Mover.write_back

    def reading(mover: Mover, slab: Slab, demand: bool) -> None:
        read.add(slab.name)
        start_read(mover, slab, demand)

    def writing(mover: Mover, slab: Slab) -> None:
        written.add(slab.name) if slab.dirty else None
        write_back(mover, slab)

    monkeypatch.setattr(Mover, "_start_read", reading)
    monkeypatch.setattr(Mover, "write_back", writing)
    tokens = torch.arange(24).view(2, 12) // 2 * 4  # all go to expert 0 ...
    tokens[1] += 2  # ... or 2
    for _ in range(4):
        model(tokens % 64).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    spilled = {u.name for u in wrapped(model).context.units if not u.param_slab.pinned}
    assert {f"layers.1.moe.experts.{i}" for i in range(EXPERTS)} <= spilled
    used = {name.split(" of ")[1] for name in read | written}
    assert "layers.1.moe.experts.0" in used
    assert not [name for name in used if name.endswith(("experts.1", "experts.3"))]
