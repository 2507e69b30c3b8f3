"""Policy(debug=True): what changes on a device, or on its way, is found before it is lost."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload.errors import CorruptionError
from offload.runtime.wrapped import wrapped
from offload.tiers.device_copy import DeviceCopy
from offload.tiers.device_tier import DeviceTier
from offload.tiers.slab import Residency, Slab

pytestmark = pytest.mark.own_device

BLOCKS = 12


def make_model(folder: Path, debug: bool, device: object = "simulated:latest") -> nn.Module:
    """A model of which three blocks fit the device."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(255, 257, bias=False) for _ in range(BLOCKS)])
    for i in range(1, BLOCKS, 2):
        model[i] = nn.Linear(257, 255, bias=False)
    budget = offload.Budget(host=6 * 2**20, device=6 * 255 * 257 * 4 + 2**14)
    policy = offload.Policy(
        budget,
        device=device,
        swap_dir=folder,
        calibrate_disk=False,
        io_block_bytes="64KiB",
        debug=debug,
    )
    return offload.wrap(model, policy)


def run(model: nn.Module, times: int = 1) -> None:
    with torch.no_grad():
        for _ in range(times):
            model(torch.ones(2, 255))


def tier_of(model: nn.Module) -> DeviceTier:
    (tier,) = wrapped(model).context.tiers
    return tier


def a_copy(model: nn.Module) -> tuple[Slab, DeviceCopy]:
    """One that may be given up at any time, and has arrived."""
    for unit in wrapped(model).context.units:
        copy = tier_of(model).copy_of(unit.param_slab)
        if copy is not None and copy.arrival is None and not copy.ahead:
            return unit.param_slab, copy
    raise AssertionError("there is no such copy")


@pytest.mark.parametrize("debug", [True, False])
def test_a_change_past_torch(tmp_path: Path, debug: bool) -> None:
    model = make_model(tmp_path, debug)
    run(model)
    slab, copy = a_copy(model)
    ctypes.memset(copy.lease.address + slab.nbytes - 4, 0x55, 4)
    if not debug:
        run(model, 3)
        return
    with pytest.raises(CorruptionError, match=r"on simulated.* changed while .*materialize"):
        run(model, 3)


@pytest.mark.parametrize("debug", [True, False])
def test_other_bytes_in_host_memory(tmp_path: Path, debug: bool) -> None:
    model = make_model(tmp_path, debug)
    run(model)
    tier = tier_of(model)
    slab = next(
        unit.param_slab
        for unit in wrapped(model).context.units
        if unit.param_slab.residency is Residency.HOST and tier.copy_of(unit.param_slab) is None
    )
    with wrapped(model).context.lock:
        assert tier.prefetch(slab, 0)
        arriving = tier.copy_of(slab)
        assert arriving is not None
        assert arriving.arrival is not None
        arriving.arrival.wait()
        ctypes.memset(slab.address, 0x55, 4)
        if debug:
            with pytest.raises(CorruptionError, match="has arrived on simulated"):
                tier.ready(slab)
        else:
            tier.ready(slab)


@pytest.mark.parametrize("debug", [True, False])
def test_other_bytes_reach_the_host(tmp_path: Path, debug: bool) -> None:
    model = make_model(tmp_path, debug)
    run(model)
    context, tier = wrapped(model).context, tier_of(model)
    slab, copy = a_copy(model)
    with context.lock:
        copy.ahead = True
        tier.send(slab)
        ctypes.memset(copy.lease.address, 0x55, 4)  # the source is read at the end
        if debug:
            with pytest.raises(CorruptionError, match="was sent from the device"):
                context.mover.settle(slab)
        else:
            context.mover.settle(slab)


@pytest.mark.parametrize("device", ["simulated:latest", ["simulated:latest"] * 2])
@pytest.mark.parametrize("update", ["cpu", "device"])
def test_training_changes_nothing_unsaid(tmp_path: Path, device: object, update: str) -> None:
    def train(model: nn.Module) -> list[torch.Tensor]:
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        found = []
        for step in range(4):
            loss = model(torch.full((2, 255), 0.1 * step)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.5)
        return [*found, *(value.clone() for value in model.state_dict().values())]

    torch.manual_seed(0)
    plain = make_model(tmp_path, False, device)
    model = make_model(tmp_path, True, device)
    assert all(map(torch.equal, train(model), train(plain)))
