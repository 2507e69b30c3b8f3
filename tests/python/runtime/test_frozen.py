"""Frozen parameters beside trained ones: a unit of their own, read and never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from torch import nn
from training import Loop

from offload.runtime.discover import FoundUnit, find_units
from offload.runtime.precision import compute_dtypes
from offload.runtime.wrapped import wrapped

SMALL = {"io_block_bytes": "64KiB", "max_unit_bytes": "4MiB"}


class Adapted(t.Stack):
    """Every block's large matrix is frozen; what surrounds it is trained."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mix.weight.requires_grad_(False)


class AdaptedCheckpointed(Adapted, t.Checkpointed):
    pass


def find_kinds(model: nn.Module) -> list[FoundUnit]:
    return find_units(model, None, 1 << 30, compute_dtypes(model, None)).units


def test_what_is_frozen_is_a_unit_apart() -> None:
    names = [unit.name for unit in find_kinds(Adapted())]
    assert names[:4] == ["(root)", "embed", "blocks.0", "blocks.0 (frozen)"]
    model = Adapted()
    model.blocks[0].out.bfloat16()
    names = [unit.name for unit in find_kinds(model)]
    assert {n for n in names if n.startswith("blocks.0")} == {
        "blocks.0 (float32)",
        "blocks.0 (float32, frozen)",
        "blocks.0 (bfloat16)",
    }


@pytest.mark.parametrize("make", [Adapted, AdaptedCheckpointed])
def test_training_beside_frozen_parameters_is_exact(make: t.Model, tmp_path: Path) -> None:
    loop = Loop(steps=3)
    budget = t.least_budget(make, **SMALL)
    t.assert_same(t.plain(make, loop), t.offloaded(make, loop, tmp_path, budget, **SMALL))


@pytest.mark.own_device
def test_a_frozen_unit_is_written_once_and_has_no_gradients(tmp_path: Path) -> None:
    model = t.wrapped(Adapted, tmp_path, t.least_budget(Adapted, **SMALL), **SMALL)
    context = wrapped(model).context
    frozen = [u for u in context.units if u.name.endswith("(frozen)") and not u.param_slab.pinned]
    assert len(frozen) > 5
    written: list[str] = []
    write_back = context.mover.write_back
    context.mover.write_back = lambda slab: (  # type: ignore[method-assign]
        written.append(slab.name) if slab.dirty else None,
        write_back(slab),
    )[1]
    optimizer = t.offload.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(3):
        model(torch.arange(24).view(2, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for unit in frozen:
        assert unit.grad_slab is None
        assert f"parameters of {unit.name}" not in written
    assert "gradients of blocks.5" in written
