"""A mixture whose experts are rows of its parameters, and what was read of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.runtime.wrapped import wrapped
from offload.tiers import mover
from offload.tiers.blocks import SlabBlocks
from offload.tiers.context import RuntimeContext
from offload.tiers.reads import Read
from offload.tiers.slab import Residency, Slab
from offload.tiers.unit import Unit

EXPERTS = 6
WIDTH, INNER = 97, 131
BLOCK = 1 << 16
SMALL: dict[str, Any] = {
    "io_block_bytes": BLOCK,
    "max_unit_bytes": 1 << 20,
    "calibrate_disk": False,
}


class Experts(nn.Module):
    """Rows are no multiples of a block, and share blocks: 101 656, 50 828 and 1 048 bytes."""

    def __init__(self, batched: bool = False) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.batched = batched
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) * 0.1)
        self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.1)
        self.act = nn.SiLU()
        self.inside: Callable[[Experts], object] = lambda experts: None
        """Called within each forward."""

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.inside(self)
        if self.batched:
            return self.at_once(hidden, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden)
        for expert in torch.unique(top_k_index):
            if expert >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            x = nn.functional.linear(
                hidden[token], self.gate_up_proj[expert], self.gate_up_bias[expert]
            )
            gate, up = x.chunk(2, dim=-1)
            x = nn.functional.linear(self.act(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, x * top_k_weights[token, place, None])
        return out

    def at_once(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        x = hidden.repeat_interleave(index.shape[-1], dim=0).unsqueeze(-1)
        flat = index.reshape(-1).clamp(max=self.num_experts - 1)
        x = torch.bmm(self.gate_up_proj[flat], x).squeeze(-1) + self.gate_up_bias[flat]
        gate, up = x.chunk(2, dim=-1)
        x = torch.bmm(self.down_proj[flat], (self.act(gate) * up).unsqueeze(-1)).squeeze(-1)
        x = x * weights.reshape(-1, 1)
        return x.view(*index.shape, -1).sum(1)


class Layer(nn.Module):
    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(batched)
        self.allowed: list[int] | None = None
        """Experts that tokens may be routed to; None: all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x).flatten(0, -2)
        scores = self.router(hidden).softmax(-1)
        if self.allowed is not None:
            mask = torch.full_like(scores, -1.0)
            mask[:, self.allowed] = 0.0
            scores = scores + mask
        weights, index = scores.topk(2, dim=-1)
        y: torch.Tensor = x + self.experts(hidden, index, top_k_weights=weights).view_as(x)
        return y


class Sparse(nn.Module):
    """Tokens to logits; the experts of a layer are 921 KB."""

    def __init__(self, batched: bool = False, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(batched) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.run(layer, x)
        logits: torch.Tensor = self.head(x)
        return logits

    def run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(x)
        return y

    def route(self, *allowed: int) -> None:
        """Let tokens go to these experts only."""
        for layer in self.layers:
            layer.allowed = list(allowed) or None


def wrap(model: Any, swap_dir: Path, spare: int = 0, **policy: Any) -> RuntimeContext:
    """Wrap `model` at the smallest budget that would do, and `spare` bytes."""
    policy = {"debug": True, **SMALL, **policy}
    plain = {key: value for key, value in policy.items() if not key.startswith("activation")}
    host = t.least_budget(lambda: copy.deepcopy(model), **plain) + spare
    host += policy.get("activation_bytes", 0)
    offload.wrap(
        model, offload.Policy(budget=offload.Budget(host=host), swap_dir=swap_dir, **policy)
    )
    return wrapped(model).context


def by_row(context: RuntimeContext) -> list[Unit]:
    """The spilled units that have rows."""
    return [unit for unit in context.units if context.goes_by_row(unit)]


def give_up(context: RuntimeContext) -> None:
    """Have nothing of the experts in memory."""
    for unit in by_row(context):
        slab = unit.param_slab
        context.mover.settle(slab)
        assert slab.locks == 0, slab.name
        assert not slab.dirty, slab.name
        if slab.lease is not None:
            context.mover.evict(slab)


def unread_is_poisoned(unit: Unit, *rows: int) -> bool:
    """Whether what no block of `rows` covers holds NaN in memory."""
    slab = unit.param_slab
    assert slab.residency is Residency.PARTIAL, slab.residency
    found = False
    for param in unit.params:
        for row in set(range(EXPERTS)) - set(rows):
            values = param.view(slab)[row].flatten()
            found |= bool(values.isnan().any())
    return found


class Reads:
    """Notes which blocks are read of which units while it is active."""

    def __init__(self, context: RuntimeContext, patch: pytest.MonkeyPatch) -> None:
        self._context = context
        self.blocks: dict[str, set[int]] = {}
        self.nbytes = 0
        self._before = self.counted()
        in_blocks, whole = mover.blocks_read, mover.whole_read

        def blocks_read(slab: Slab, store: Any, blocks: Sequence[int], demand: bool) -> Read:
            read = in_blocks(slab, store, blocks, demand)
            self.blocks.setdefault(slab.name, set()).update(blocks)
            self.nbytes += read.nbytes
            return read

        def whole_read(slab: Slab, store: Any, demand: bool) -> Read:
            assert slab not in [unit.param_slab for unit in by_row(context)], slab.name
            read = whole(slab, store, demand)
            self.nbytes += slab.nbytes
            return read

        patch.setattr(mover, "blocks_read", blocks_read)
        patch.setattr(mover, "whole_read", whole_read)

    def counted(self) -> int:
        """Bytes that the mover says it read."""
        return self._context.mover.read_bytes

    def assert_of(self, *rows: int) -> None:
        """The blocks of `rows`, and no others, were read of each unit; and forget them."""
        for unit in by_row(self._context):
            blocks = SlabBlocks.of_size(unit.param_bytes, BLOCK)
            wanted = set(blocks.missing(unit.ranges(frozenset(rows))))
            assert self.blocks.get(unit.param_slab.name, set()) == wanted, unit.name
        assert self.counted() - self._before == self.nbytes
        self._before = self.counted()
        self.nbytes = 0
        self.blocks.clear()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that rows are read to holds NaN before, though it may never have been used."""
    begin = mover.begin_partial

    def filled(slab: Slab, store: Any) -> SlabBlocks:
        if slab.residency is Residency.DISK:
            slab.view(0, (slab.nbytes,), (1,), torch.uint8).fill_(0xFF)
        return begin(slab, store)

    monkeypatch.setattr(mover, "begin_partial", filled)
