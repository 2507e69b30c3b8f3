"""A device with the host's memory: nothing is copied, and the host waits for what it must."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload import _native
from offload.runtime.wrapped import wrapped
from offload.tiers import compute_device
from offload.tiers.slab import Slab
from offload.tiers.unified_tier import UnifiedTier

pytestmark = pytest.mark.own_device
TOKENS = torch.arange(24).view(2, 12)
OPTIONS: dict[str, Any] = {"device": "simulated:unified", "debug": True, **t.SMALL_BLOCKS}


def make() -> nn.Module:
    torch.manual_seed(0)
    return t.Stack(layers=6)


def offloaded(folder: Path, host: int | str = 0, **options: Any) -> nn.Module:
    """Everything spilled to the disk that may be, unless there is room; none for the device."""
    host = host or t.least_budget(t.Stack, **t.SMALL_BLOCKS)
    policy = offload.Policy(offload.Budget(host=host), swap_dir=folder, **OPTIONS, **options)
    return offload.wrap(make(), policy)


def steps(model: nn.Module, accumulate: int = 2, **options: Any) -> Iterator[float]:
    optimizer = offload.AdamW(model.parameters(), lr=1e-2, **options)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(accumulate):
            loss = model(TOKENS.roll(step + micro)).square().mean()
            loss.backward()
            yield loss.item()
        if not options:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def tier_of(model: nn.Module) -> UnifiedTier:
    (tier,) = wrapped(model).context.tiers
    assert isinstance(tier, UnifiedTier)
    return tier


@pytest.mark.parametrize("host", [0, "12MiB", "64MiB"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_training_is_exact_and_copies_nothing(lazy: bool, host: int | str, tmp_path: Path) -> None:
    plain, model = make(), offloaded(tmp_path, host, lazy_step=lazy)
    assert list(steps(plain)) == list(steps(model))
    stats, counters = tier_of(model).device.stats(), wrapped(model).counters()
    assert (stats["h2d_bytes"], stats["d2h_bytes"], stats["d2d_bytes"]) == (0, 0, 0)
    assert stats["conflicts"] == 0
    assert counters["arena_peak_bytes"] <= counters["arena_budget_bytes"]
    assert any("nothing is copied to it" in note for note in offload.report(model).notes)
    offload.unwrap(model)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stepping_inside_the_backward_is_exact(tmp_path: Path) -> None:
    plain, model = make(), offloaded(tmp_path)
    expected = list(steps(plain, accumulate=1, step_in_backward=True))
    assert list(steps(model, accumulate=1, step_in_backward=True)) == expected


def test_tensors_of_parameters_lie_on_the_memory_of_their_slabs(tmp_path: Path) -> None:
    model = offloaded(tmp_path)
    with offload.materialize(model.blocks[0]):
        for unit in wrapped(model).context.units:
            for param in unit.params:
                if param.name.startswith("blocks.0."):
                    assert param.param.data_ptr() == param.address(unit.param_slab.address)


def test_what_is_written_to_parameters_is_kept(tmp_path: Path) -> None:
    plain, model = make(), offloaded(tmp_path)
    for each in (plain, model):
        with torch.no_grad():
            for param in each.parameters():
                param.mul_(1.25)
        each.blocks[0].mix.weight.data.add_(1)
    with offload.materialize(model.blocks[1]):
        model.blocks[1].mix.weight.data.add_(2)
    plain.blocks[1].mix.weight.data.add_(2)
    assert list(steps(plain)) == list(steps(model))


def test_a_tensor_that_somebody_keeps_keeps_its_memory(tmp_path: Path) -> None:
    model = offloaded(tmp_path)
    context, tier = wrapped(model).context, tier_of(model)
    slab = next(u.param_slab for u in context.units if not u.param_slab.pinned)
    slab.locks += 1
    kept = tier.fetch(slab).view(0, (slab.nbytes,), (1,), torch.uint8)
    slab.locks -= 1
    values = kept.clone()
    assert tier.is_reading(slab), "it is not to be evicted"
    context.mover.settle(slab)
    context.mover.evict(slab)  # all the same
    list(steps(model))
    assert torch.equal(kept, values)
    del kept
    tier.leave(slab)
    assert not tier._parting


# -- which waits are needed -----------------------------------------------------------------------


def test_memory_is_not_given_up_while_the_compute_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(self: UnifiedTier, slab: Slab) -> None:
        copy = self.room.copies.pop(slab, None)
        if copy is not None and slab.lease is not None:
            self.device.use_host(slab.lease, "write", slab.name)

    model = offloaded(tmp_path)
    monkeypatch.setattr(UnifiedTier, "leave", leave)
    monkeypatch.setattr(UnifiedTier, "is_reading", lambda self, slab: self.room.copies[slab].ahead)
    with pytest.raises(offload.UnorderedAccessError, match="on the host"):
        list(steps(model))


def test_gradients_are_not_changed_before_they_have_been_written(tmp_path: Path) -> None:
    model = offloaded(tmp_path, "64MiB")
    optimizer = offload.AdamW(model.parameters(), lr=1e-2)
    model(TOKENS).square().mean().backward()
    slabs = [unit.grad_slab for unit in wrapped(model).context.units]
    sent = [slab for slab in slabs if slab is not None and slab.pending is not None]
    assert sent
    for slab in sent:
        tier_of(model).fetch(slab)
        assert slab.pending is None
    optimizer.step()


@pytest.mark.parametrize("careless", [False, True])
def test_the_host_waits_for_the_compute_before_it_changes_bytes(
    careless: bool, tmp_path: Path
) -> None:
    model = offloaded(tmp_path)
    context, tier = wrapped(model).context, tier_of(model)
    slab = context.units[0].param_slab
    slab.locks += 1
    copy = tier.fetch(slab)
    copy.view(0, (8,), (1,), torch.uint8)
    slab.locks -= 1
    if careless:
        tier.room.copies.clear()  # it does not know of the use
        with pytest.raises(offload.UnorderedAccessError, match="on the host"):
            context.mover.settle(slab)
    else:
        context.mover.settle(slab)
    assert tier.device.stats()["conflicts"] == careless


@pytest.mark.parametrize("reason", ["use before the copy to the host"])
def test_no_wait_between_streams_may_be_missing(reason: str, tmp_path: Path) -> None:
    model = offloaded(tmp_path)
    tier_of(model).device.omit_waits(reason)
    with pytest.raises(offload.UnorderedAccessError):
        list(steps(model))


# -- detection ------------------------------------------------------------------------------------


def test_the_policy_says_what_it_takes(tmp_path: Path) -> None:
    for device in ("simulated:unified", "cuda"):
        offload.Policy(offload.Budget(host="1GiB"), device=device)
    with pytest.raises(offload.PolicyError, match=r"needs Budget\(device=...\)"):
        offload.Policy(offload.Budget(host="1GiB"), device="simulated")
    with pytest.raises(offload.PolicyError, match='use update="auto" or "cpu"'):
        offloaded(tmp_path, update="device")
    model = offloaded(tmp_path, update="auto")
    list(steps(model))
    assert wrapped(model).counters()["device_updates"] == 0


@pytest.mark.parametrize("unified", [True, False])
def test_a_gpu_is_asked_what_it_is(unified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was none to ask."""
    asked = []

    def host_access(index: int) -> dict[str, bool]:
        asked.append(index)
        return {"unified": unified}

    monkeypatch.setattr(_native, "cuda_host_access", host_access)
    policy = offload.Policy(offload.Budget(host="1GiB"), device="cuda:1")
    where = torch.device("cuda", 1)
    if unified:
        assert compute_device.shares_memory(policy, [where])
    else:
        with pytest.raises(offload.PolicyError, match=re.escape("needs Budget(device=...)")):
            compute_device.shares_memory(policy, [where])
    assert asked == [1]


def test_only_pinned_memory_of_a_unified_device_is_its_own() -> None:
    apart = _native.simulated_device(1 << 20)
    assert not apart.host_access["unified"]
    with pytest.raises(offload.OffloadError, match="memory apart"):
        _native.DeviceArena.over_host(apart, _native.HostArena(1 << 20, pin=apart))
    device = _native.simulated_device(1 << 20, unified=True)
    assert device.host_access["unified"]
    with pytest.raises(offload.OffloadError, match="pin the HostArena"):
        _native.DeviceArena.over_host(device, _native.HostArena(1 << 20))


def test_a_lease_is_idle_when_its_uses_have_ended() -> None:
    device = _native.simulated_device(1 << 20, pace="latest", unified=True)
    host = _native.HostArena(1 << 20, pin=device)
    arena = _native.DeviceArena.over_host(device, host)
    memory = host.allocate(4096)
    assert arena.address <= memory.address < arena.address + arena.usage()["budget"]
    lease = arena.try_allocate_at(memory.address - arena.address, 4096, "gradients")
    assert lease is not None
    assert lease.address == memory.address
    view = lease.view()
    assert lease.is_open
    assert not lease.is_idle()
    with pytest.raises(offload.UnorderedAccessError, match="gradients"):
        device.use_host(memory, "read", "gradients")
    lease.wait_for_uses()  # of what was submitted so far
    device.use_host(memory, "read", "gradients")
    del view
    assert lease.is_idle()
    assert not lease.is_open
    device.use_host(memory, "write", "gradients")
    device.copy_to_host(memory, lease, 4096)  # nothing to copy, but a read of it
    with pytest.raises(offload.UnorderedAccessError):
        device.use_host(memory, "write", "gradients")
    assert device.stats()["d2h_bytes"] == 0
