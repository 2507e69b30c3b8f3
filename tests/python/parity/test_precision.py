"""Autocast and gradient scaling around a wrapped model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from comparison import (
    assert_parity,
    assert_spilled,
    batches,
    offload_adamw,
    own_loss,
    seeded,
    torch_adamw,
    wrap,
)
from torch import nn
from zoo import BY_NAME, Batch, Case

CASES = [BY_NAME[n] for n in ("gpt2", "llama", "mixtral", "t5", "mamba")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_under_autocast_is_exact(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return own_loss(model, batch)

    assert_parity(case.make, batches(case), tmp_path, loss_of)


def test_training_with_a_gradient_scaler_is_exact(tmp_path: Path) -> None:
    """A scale that overflows at first: steps are skipped until it is small enough."""
    case = BY_NAME["gpt2"]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> t.Outcome:
        outcome = t.Outcome()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)
        for batch in batches(case, 12):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = own_loss(model, batch)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            outcome.norms.append(norm.item())
            outcome.losses += [loss.item(), scaler.get_scale()]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        outcome.weights = {k: v.clone() for k, v in model.state_dict().items()}
        return outcome

    plain = seeded(case.make)
    expected = train(plain, torch_adamw(plain))
    model = wrap(case.make, tmp_path)
    found = train(model, offload_adamw(model))
    found.norms = [n if n == n else 0.0 for n in found.norms]
    expected.norms = [n if n == n else 0.0 for n in expected.norms]
    t.assert_same(expected, found)
    assert len(set(found.losses[1::2])) > 2, "the scale never changed"
    assert_spilled(model)
