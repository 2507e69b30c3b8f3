"""Policy(debug=True): a clean slab that changes in memory is found before the change is lost."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload.errors import CorruptionError
from offload.tiers.slab import Residency, Slab
from offload.tiers.unit import owner_of

BLOCKS = 24


def make_model(folder: Path, debug: bool) -> nn.Module:
    """A model of which two or three blocks fit its budget."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(BLOCKS)])
    budget = offload.Budget(host=4 * 2**20, disk=2**28)
    policy = offload.Policy(
        budget=budget, swap_dir=folder, calibrate_disk=False, io_block_bytes="64KiB", debug=debug
    )
    return offload.wrap(model, policy)


def clean_slab(model: nn.Module) -> Slab:
    """A slab whose memory may be given up at any time."""
    for param in model.parameters():
        owner = owner_of(param)
        assert owner is not None
        slab = owner.unit.param_slab
        if slab.residency is Residency.HOST and not (slab.dirty or slab.locks or slab.pinned):
            return slab
    raise AssertionError("no slab is clean")


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    loss: torch.Tensor = model(torch.randn(8, 256, generator=generator)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def run_often(model: nn.Module) -> None:
    """Every slab is given up once."""
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 256))


@pytest.mark.parametrize("debug", [True, False])
def test_a_change_past_torch(tmp_path: Path, debug: bool) -> None:
    model = make_model(tmp_path, debug)
    with torch.no_grad():
        model(torch.randn(8, 256))
    slab = clean_slab(model)
    ctypes.memset(slab.address + 1000, 0x55, 4)
    if debug:
        with pytest.raises(CorruptionError, match=r"changed in memory since .*materialize"):
            run_often(model)
    else:
        run_often(model)


def test_training_changes_nothing_unsaid(tmp_path: Path) -> None:
    losses = []
    for debug in (True, False):
        model = make_model(tmp_path, debug)
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        losses.append([step(model, optimizer) for _ in range(4)])
        with torch.no_grad():  # in place, by torch: noticed
            for param in model.parameters():
                param.mul_(0.5)
        losses[-1].append(step(model, optimizer))
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
