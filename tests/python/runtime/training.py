"""Small models and a training loop that knows nothing about offload."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload

Model = Callable[[], nn.Module]

SMALL_BLOCKS: dict[str, Any] = {"io_block_bytes": 1 << 19}
"""The staging of an update is 12 blocks: with the usual ones it would be most of these budgets."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(nn.functional.gelu(self.mix(self.norm(x))))


class Stack(nn.Module):
    """Tokens to logits through residual blocks; every block is 1.05 MB, the model 10.7 MB."""

    def __init__(self, layers: int = 10, width: int = 256, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 64, bias=False)
        self.scale = nn.Parameter(torch.ones(width))  # used by the root itself
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.run(block, x)
        logits: torch.Tensor = self.head(x * self.scale)
        return logits

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = block(x)
        return y


class Checkpointed(Stack):
    reentrant = False

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(block, x, use_reentrant=self.reentrant)
        return y


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointedInside(Stack):
    """The blocks checkpoint their own forward: the recomputation does not pass their hooks."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.forward = functools.partial(self.checkpointed, block)
            block.norm.requires_grad_(False)
            block.out.weight.requires_grad_(False)

    def checkpointed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.recomputed, block, x, use_reentrant=self.reentrant)
        return y

    def recomputed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        upper, lower = block.mix.weight.chunk(2)  # views of a parameter
        mixed = torch.cat([x @ upper.t(), x @ lower.t()], -1) + block.mix.bias
        y: torch.Tensor = x + block.out(nn.functional.gelu(mixed))
        return y


class CheckpointedInsideReentrant(CheckpointedInside):
    reentrant = True


class UsesOthersWeight(Stack):
    """The head's weight is used by the root, never by calling the head."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(tokens, self.embed.weight)
        for block in self.blocks:
            x = self.run(block, x)
        return nn.functional.linear(x, self.head.weight)


class SharedBlock(Stack):
    """One block is called several times per forward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for i in (0, 1, 0, 2, 0):
            x = self.blocks[i](x)
        logits: torch.Tensor = self.head(x)
        return logits


class Routed(Stack):
    """Which blocks run depends on the data; some get no gradient in a step."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        first = int(tokens[0, 0]) % len(self.blocks)
        for i in (first, (first + 3) % len(self.blocks)):
            x = self.blocks[i](x)
        logits: torch.Tensor = self.head(x)
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.lstm = nn.LSTM(64, 512, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, 64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return logits


class Convolutional(nn.Module):
    """BatchNorm buffers, a channels-last weight, a weight shared by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 256)
        self.convs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.BatchNorm2d(256))
                for _ in range(3)
            )
        )
        with torch.no_grad():
            weight = self.convs[1][0].weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.convs[2][0].weight = self.convs[0][0].weight
        self.head = nn.Linear(256, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).permute(0, 2, 1).unsqueeze(2)
        logits: torch.Tensor = self.head(self.convs(x).squeeze(2).permute(0, 2, 1))
        return logits


@dataclass
class Loop:
    """What varies in the training loop."""

    steps: int = 5
    micro_batches: int = 3
    clip: float | None = 0.3
    set_to_none: bool = True
    eval_every: int = 0
    grads: bool = True


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loop: Loop) -> Outcome:
    """Run an ordinary loop and note everything that must agree."""
    outcome = Outcome()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 3))
    data = torch.Generator().manual_seed(1)
    for step in range(loop.steps):
        for _ in range(loop.micro_batches):
            tokens = torch.randint(0, 64, (2, 12), generator=data)
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss = loss / loop.micro_batches
            loss.backward()  # type: ignore[no-untyped-call]
            outcome.losses.append(loss.item())
        if loop.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
            outcome.norms.append(norm.item())
        if loop.grads:
            outcome.grads.append(
                {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            )
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=loop.set_to_none)
        if loop.eval_every and step % loop.eval_every == 0:
            model.eval()
            with torch.no_grad():
                outcome.losses.append(model(tokens).sum().item())
            model.train()
    outcome.weights = {k: v.clone() for k, v in model.state_dict().items()}
    return outcome


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices alone, as people do."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def plain(make: Model, loop: Loop) -> Outcome:
    """Train with torch alone."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.1, foreach=False)
    return train(model, optimizer, loop)


def wrapped(make: Model, swap_dir: Path, budget: int, **policy: Any) -> nn.Module:
    """Make the same model as plain() does, wrapped, with released memory poisoned."""
    torch.manual_seed(0)
    policy = {"debug": True, **SMALL_BLOCKS, **policy}
    return offload.wrap(
        make(), offload.Policy(budget=offload.Budget(host=budget), swap_dir=swap_dir, **policy)
    )


def offloaded(make: Model, loop: Loop, swap_dir: Path, budget: int, **policy: Any) -> Outcome:
    """Train with offload within `budget` bytes, which must spill, and must hold.

    Where updates run on a device, the least budget may hold all of a small model.
    """
    model = wrapped(make, swap_dir, budget, **policy)
    optimizer = offload.AdamW(groups(model), lr=1e-2, weight_decay=0.1)
    outcome = train(model, optimizer, loop)
    report = offload.report(model)
    assert report.plan.spills or report.device_units
    assert report.counters["arena_peak_bytes"] <= budget
    assert report.counters["disk_write_bytes"] > 0 or not report.plan.spills
    return outcome


def assert_same(a: Outcome, b: Outcome) -> None:
    """Every loss, norm, gradient and weight is the same bits."""
    assert a.losses == b.losses
    assert a.norms == b.norms
    assert list(a.weights) == list(b.weights)
    for name, weight in a.weights.items():
        assert torch.equal(weight, b.weights[name]), name
    for step, (ours, theirs) in enumerate(zip(a.grads, b.grads, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, grad in ours.items():
            other = theirs[name]
            assert (grad is None) == (other is None), (step, name)
            if grad is not None and other is not None:
                assert torch.equal(grad, other), (step, name)


def least_budget(make: Model, **policy: Any) -> int:
    """The smallest host budget that wrap() says would do."""
    policy = {**SMALL_BLOCKS, **policy}
    with pytest.raises(offload.BudgetError) as caught:
        offload.wrap(
            make(), offload.Policy(budget=offload.Budget(host=8192), swap_dir="/tmp", **policy)
        )
    found = re.search(r"smallest host budget that would do is (\d+) bytes", str(caught.value))
    assert found is not None, caught.value
    return int(found.group(1))
