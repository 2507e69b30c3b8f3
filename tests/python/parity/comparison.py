"""The same training with and without offload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training as t
from torch import nn
from training import Outcome
from zoo import Batch, Case

import offload

STEPS = 3
POLICY: dict[str, Any] = {
    "debug": True,
    "io_block_bytes": "64KiB",
    "max_unit_bytes": "1MiB",
    "calibrate_disk": False,
}
"""Blocks stay whole: their parts are too small to be spilled. Larger I/O blocks, of which an update
takes 12 for staging, would be most of a budget."""

Loss = Callable[[nn.Module, Batch], torch.Tensor]
Make = Callable[[], nn.Module]


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a model of transformers returns."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def seeded(make: Make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def batches(case: Case, count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [case.batch(generator) for _ in range(count)]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[Batch],
    loss_of: Loss = own_loss,
) -> Outcome:
    """One step for each batch, noting losses, gradients and the final weights."""
    outcome = Outcome()
    torch.manual_seed(2)  # of dropout
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        outcome.losses.append(loss.item())
        outcome.grads.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        )
        optimizer.step()
        optimizer.zero_grad()
    outcome.weights = {k: v.clone() for k, v in model.state_dict().items()}
    return outcome


def torch_adamw(model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=False, fused=False)


def offload_adamw(model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return offload.AdamW(params, lr=1e-2, weight_decay=0.1)


def wrap(make: Make, swap_dir: Path, spare: int = 0, **policy: Any) -> nn.Module:
    """Wrap a seeded model at the smallest budget that would do, and `spare` bytes."""
    policy = {**POLICY, **policy}
    budget = t.least_budget(make, **policy) + spare
    model = seeded(make)
    return offload.wrap(
        model, offload.Policy(budget=offload.Budget(host=budget), swap_dir=swap_dir, **policy)
    )


def assert_spilled(model: nn.Module) -> None:
    """Parameters went to disk and came back, and the budget held."""
    report = offload.report(model)
    assert any(not p.pin_params for p in report.plan.placements)
    numbers = report.as_dict()
    assert numbers["disk_read_bytes"] > 0
    assert numbers["disk_write_bytes"] > 0
    assert numbers["arena_peak_bytes"] <= report.plan.budget_bytes


def assert_parity(
    make: Make, data: list[Batch], swap_dir: Path, loss_of: Loss = own_loss, **policy: Any
) -> None:
    """Train both ways and compare all bits."""
    expected = train(model := seeded(make), torch_adamw(model), data, loss_of)
    model = wrap(make, swap_dir, **policy)
    found = train(model, offload_adamw(model), data, loss_of)
    t.assert_same(expected, found)
    assert_spilled(model)
