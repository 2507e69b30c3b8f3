"""Training on a device apart: the bits of plain training, within its budget, in proven order."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload import _native
from offload.runtime.wrapped import wrapped
from offload.tiers.device_tier import COPY, DeviceTier
from offload.tiers.mover import Mover
from offload.tiers.slab import Residency

pytestmark = pytest.mark.own_device
TOKENS = torch.arange(24).view(2, 12)
UNIT = 2 * 1054720
"""Parameters and gradients of a block of t.Stack; it is split in two, for an update's sake."""
PACES = ["simulated", "simulated:latest", "simulated:earliest"]


def make() -> nn.Module:
    torch.manual_seed(0)
    return t.Stack(layers=6)


def policy(folder: Path, device: str, nbytes: int = 3 * UNIT, **options: Any) -> offload.Policy:
    """Everything spilled to the disk that may be, and `nbytes` of device memory."""
    options = {"debug": True, **t.SMALL_BLOCKS, **options}
    budget = offload.Budget(host=t.least_budget(t.Stack, **options), device=nbytes)
    return offload.Policy(budget, device=device, swap_dir=folder, **options)


def train(model: nn.Module, accumulate: int = 2, **options: Any) -> list[float]:
    """Three steps with accumulation and clipping; returns the losses."""
    optimizer = offload.AdamW(model.parameters(), lr=1e-2, **options)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(accumulate):
            loss = model(TOKENS.roll(step + micro)).square().mean()
            loss.backward()
            losses.append(loss.item())
        if not options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return losses


def device_of(model: nn.Module) -> DeviceTier:
    (tier,) = wrapped(model).context.tiers
    return tier


@pytest.mark.parametrize("device", PACES)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_training_in_three_units_is_exact(device: str, lazy: bool, tmp_path: Path) -> None:
    plain = make()
    expected = train(plain)
    model = offload.wrap(make(), policy(tmp_path, device, lazy_step=lazy))
    assert train(model) == expected
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tier = device_of(model)
    stats, usage = tier.device.stats(), tier.room.ring.usage()
    home = tier.room.home.usage()["budget"] if tier.room.home is not None else 0
    assert stats["conflicts"] == 0
    assert usage["peak"] <= usage["budget"] <= 3 * UNIT - home
    assert stats["h2d_bytes"] > 0
    assert stats["d2h_bytes"] > 0


def test_stepping_inside_the_backward_is_exact(tmp_path: Path) -> None:
    plain = make()
    expected = train(plain, accumulate=1, step_in_backward=True)
    model = offload.wrap(make(), policy(tmp_path, "simulated:latest"))
    assert train(model, accumulate=1, step_in_backward=True) == expected
    offload.unwrap(model)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_written_to_parameters_comes_home(tmp_path: Path) -> None:
    plain, model = make(), offload.wrap(make(), policy(tmp_path, "simulated:latest"))
    for each in (plain, model):
        with torch.no_grad():
            for param in each.parameters():
                param.mul_(1.25)
        each.blocks[0].mix.weight.data.add_(1)
    with offload.materialize(model.blocks[1]):
        model.blocks[1].mix.weight.data.add_(2)
    plain.blocks[1].mix.weight.data.add_(2)
    assert train(plain) == train(model)
    offload.unwrap(model)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


REASONS = [
    "copy to the device before its use",
    "use before the copy to the host",
    "reuse of device memory",
]


@pytest.mark.parametrize("device", ["simulated:latest", "simulated:earliest"])
@pytest.mark.parametrize("reason", REASONS)
def test_no_wait_between_streams_may_be_missing(reason: str, device: str, tmp_path: Path) -> None:
    model = offload.wrap(make(), policy(tmp_path, device))
    device_of(model).device.omit_waits(reason)
    with pytest.raises(offload.UnorderedAccessError):
        train(model)


def test_those_are_all_the_reasons(tmp_path: Path) -> None:
    model = offload.wrap(make(), policy(tmp_path, "simulated:latest"))
    train(model)
    waits = device_of(model).device.stats()["waits"]
    # The other one is needed where more is kept: test_device_updates.py.
    assert sorted(waits) == sorted([*REASONS, "copy to the host before a change"])


def test_the_host_waits_for_copies_before_it_changes_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offload.wrap(make(), policy(tmp_path, "simulated:latest"))
    tier, mover = device_of(model), wrapped(model).context.mover
    slabs = [unit.param_slab for unit in wrapped(model).context.units]
    for slab in slabs[:2]:
        mover.settle(slab)
        mover.fetch(slab)
        assert tier.prefetch(slab, 0)
    mover.settle(slabs[0])
    wait = Mover.wait

    def careless(self: Mover, transfer: _native.Transfer, why: str) -> None:
        if why != COPY:
            wait(self, transfer, why)

    monkeypatch.setattr(Mover, "wait", careless)
    with pytest.raises(offload.UnorderedAccessError, match="on the host"):
        mover.settle(slabs[1])


def test_a_prefetch_goes_from_disk_to_the_device_by_itself(tmp_path: Path) -> None:
    model = offload.wrap(make(), policy(tmp_path, "simulated:latest"))
    tier, mover = device_of(model), wrapped(model).context.mover
    slab = next(u.param_slab for u in wrapped(model).context.units if not u.param_slab.pinned)
    mover.settle(slab)
    expected = slab.view(0, (slab.nbytes,), (1,), torch.uint8).clone()
    mover.evict(slab)
    tier.drop(slab)
    misses = mover.misses
    assert tier.prefetch(slab, 0)
    copy = tier.copy_of(slab)
    assert copy is not None
    assert copy.arrival is not None
    deadline = time.monotonic() + 60
    while not copy.arrival.issued():
        assert time.monotonic() < deadline
    slab.locks += 1
    there = tier.fetch(slab).view(0, (slab.nbytes,), (1,), torch.uint8)
    slab.locks -= 1
    assert torch.equal(there, expected)
    assert mover.misses == misses


def test_a_copy_that_is_given_up_while_it_is_read_keeps_its_memory(tmp_path: Path) -> None:
    """Until then nobody else gets it, and who needs room waits for that."""
    model = offload.wrap(make(), policy(tmp_path, "simulated:latest"))
    tier, mover = device_of(model), wrapped(model).context.mover
    slabs = [u.param_slab for u in wrapped(model).context.units if not u.param_slab.pinned]
    largest = [s for s in slabs if s.nbytes == max(s.nbytes for s in slabs)]
    for _ in range(20):
        for slab in largest:
            mover.settle(slab)
            if slab.residency is Residency.HOST and not slab.locks:
                mover.evict(slab)
            tier.drop(slab)
        tier.room.next_use = {}
        for use, slab in enumerate(largest):
            tier.prefetch(slab, use)
        first = largest[-1]
        first.locks += 1
        tier.fetch(first)
        first.locks -= 1


def test_a_copy_that_ended_meanwhile_has_made_room(tmp_path: Path) -> None:
    """Who found it in flight, and nothing to evict for that, has to look once more."""
    model = offload.wrap(make(), policy(tmp_path, "simulated:earliest"))
    tier, mover = device_of(model), wrapped(model).context.mover
    slab = wrapped(model).context.units[0].param_slab
    mover.settle(slab)
    mover.fetch(slab)
    while tier.end_one():  # what wrap has begun
        pass
    tier.drop(slab)
    assert tier.prefetch(slab, 0)
    tier._reading[slab].wait()
    assert tier.end_one()
    assert not tier.end_one()


def test_a_budget_that_is_too_small_is_refused_with_the_least(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(offload.BudgetError) as refused:
        offload.wrap(model, policy(tmp_path, "simulated", 100_000, max_unit_bytes="2MiB"))
    found = re.search(r"smallest device budget that would do is (\d+) bytes", str(refused.value))
    assert found is not None
    least = int(found[1])
    with pytest.raises(offload.BudgetError):
        offload.wrap(model, policy(tmp_path, "simulated", least - 1, max_unit_bytes="2MiB"))
    plain = make()
    expected = train(plain)
    offload.wrap(model, policy(tmp_path, "simulated", least, max_unit_bytes="2MiB"))
    assert train(model) == expected


def test_a_device_needs_a_budget() -> None:
    with pytest.raises(offload.PolicyError, match=r"needs Budget\(device=...\)"):
        offload.Policy(offload.Budget(host="1GiB"), device="simulated")
