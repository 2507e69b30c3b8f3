"""Updates on the CPU of a model on a device: they follow their gradients' copies, nobody waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from interrupted_updates import first_line_not_reached, small
from torch import nn

import offload
from offload import _native
from offload.runtime.wrapped import wrapped
from offload.tiers.context import RuntimeContext
from offload.tiers.mover import Mover
from offload.tiers.slab import Slab
from offload.tiers.unit import Unit
from offload.tiers.update_job import UpdateJob
from offload.tiers.updates import Updates

pytestmark = pytest.mark.own_device
TOKENS = torch.arange(24).view(2, 12)
PACES = ["simulated", "simulated:latest", "simulated:earliest"]


def make() -> nn.Module:
    torch.manual_seed(0)
    return t.Stack(layers=4)


def offloaded(device: str, folder: Path, host: int | str = "256MiB", **options: Any) -> nn.Module:
    budget = offload.Budget(host=host, device="32MiB")
    return offload.wrap(
        make(),
        offload.Policy(
            budget, device=device, update="cpu", swap_dir=folder, **t.SMALL_BLOCKS, **options
        ),
    )


def least(**options: Any) -> int:
    return t.least_budget(t.Stack, **t.SMALL_BLOCKS, **options)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return offload.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def backward(model: nn.Module, step: int) -> torch.Tensor:
    loss: torch.Tensor = model(TOKENS.roll(step)).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, steps: int = 4) -> list[torch.Tensor]:
    """Returns losses, weights and states."""
    optimizer, seen = adamw(model), []
    for step in range(steps):
        seen.append(backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    seen += [value for kept in state.values() for _, value in sorted(kept.items())]
    return seen + [value.clone() for value in model.state_dict().values()]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
    )


def units_of(model: nn.Module) -> list[Unit]:
    return list(wrapped(model).context.units)


def host_waits(model: nn.Module) -> int:
    return int(offload.report(model).counters["device_host_waits"])


def is_updating(model: nn.Module) -> bool:
    return any(u.update is not None and not u.update.done() for u in units_of(model))


@pytest.mark.parametrize("device", PACES)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("spilled", [True, False], ids=["spilled", "in memory"])
@pytest.mark.parametrize("debug", [True, False], ids=["debug", "plain"])
def test_training_is_exact(
    device: str, lazy: bool, spilled: bool, debug: bool, tmp_path: Path
) -> None:
    host = least(debug=debug, lazy_step=lazy) if spilled else "256MiB"
    model = offloaded(device, tmp_path, host, debug=debug, lazy_step=lazy)
    assert same(train(model), train(make()))


def test_neither_the_step_nor_the_next_forward_waits_for_the_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _native, "simulated_device", partial(_native.simulated_device, delay_s=0.04)
    )
    model, plain = offloaded("simulated", tmp_path), make()
    ours, theirs = adamw(model), adamw(plain)
    on_their_way = []
    for step in range(4):
        ours.zero_grad()
        theirs.zero_grad()
        loss = backward(plain, step)
        theirs.step()
        assert torch.equal(backward(model, step), loss)
        before = host_waits(model)
        ours.step()
        on_their_way.append(is_updating(model))
        deadline = time.monotonic() + 60
        while is_updating(model):  # the training loop reads its next batch, say
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with torch.no_grad():
            assert torch.equal(model(TOKENS), plain(TOKENS))
        assert host_waits(model) == before
    assert any(on_their_way)
    assert same(list(model.state_dict().values()), list(plain.state_dict().values()))


def test_latest_a_forward_that_needs_an_update_has_its_gradients_come(tmp_path: Path) -> None:
    model = offloaded("simulated:latest", tmp_path)
    optimizer = adamw(model)
    backward(model, 0)
    before = host_waits(model)
    optimizer.step()
    time.sleep(0.05)
    assert is_updating(model)
    assert host_waits(model) == before
    backward(model, 1)
    assert host_waits(model) > before


def test_without_the_dependency_an_update_takes_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = UpdateJob.prepare
    monkeypatch.setattr(UpdateJob, "prepare", lambda job, *args: prepare(job, *args[:2], ()))
    model = offloaded("simulated:latest", tmp_path)
    assert not same(train(model, 2), train(make(), 2))


def test_the_end_of_a_copy_is_what_an_update_follows(tmp_path: Path) -> None:
    model = offloaded("simulated:latest", tmp_path)
    (tier,) = wrapped(model).context.tiers
    tier.device.omit_waits("copy before the host's use")
    with pytest.raises(offload.UnorderedAccessError):
        train(model)


def cancelled_copy(store: _native.SwapStore) -> _native.DeviceTransfer:
    """A copy that has failed: its second half, to the disk, was cancelled."""
    device = _native.simulated_device(1 << 20, pace="latest")
    host = _native.HostArena(1 << 20, pin=device)
    arena = _native.DeviceArena(device, 1 << 16)
    transfers = _native.DeviceTransfers(device)  # which lets the first half end when it goes
    transfer = transfers.spill(
        arena.allocate(512), host.allocate(512), 512, store=store, object=store.create(512)
    )
    transfer.cancel()
    return transfer


def test_gradients_that_do_not_come_leave_their_unit_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offloaded("simulated:latest", tmp_path)
    context = wrapped(model).context
    failing = context.units[1]
    optimizer = adamw(model)
    backward(model, 0)
    before = [value.clone() for value in params_of(context, failing)]
    in_flight = Mover.in_flight
    store = _native.SwapStore(str(tmp_path))
    store.reserve(1 << 20, 1 << 20)

    def with_failure(self: Mover, slab: Slab) -> list[Any]:
        found = in_flight(self, slab)
        return [*found, cancelled_copy(store)] if slab is failing.param_slab else found

    monkeypatch.setattr(Mover, "in_flight", with_failure)
    optimizer.step()
    for _ in range(2):
        with pytest.raises(offload.TransferCancelledError):
            model(TOKENS)
    assert same(params_of(context, failing), before)
    context.pipeline.close()  # no other update failed


def params_of(context: RuntimeContext, unit: Unit) -> list[torch.Tensor]:
    """What the unit's slab holds, whether an update is pending or not."""
    with context.lock:
        return [param.view(unit.param_slab) for param in unit.params]


def test_closing_ends_updates_that_wait_for_copies(tmp_path: Path) -> None:
    model = offloaded("simulated:latest", tmp_path)
    optimizer = adamw(model)
    backward(model, 0)
    optimizer.step()
    assert is_updating(model)
    pending = [u.update for u in units_of(model) if u.update is not None]
    wrapped(model).context.close()
    assert all(update.done() for update in pending)


TRACED = (
    *(Updates._start, Updates._submit, Updates.start),
    *(Mover.in_flight, Mover.settle, Mover._finish, UpdateJob.prepare),
)


def test_an_update_that_is_interrupted_on_any_line_is_taken_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, model = small(), small()
    budget = offload.Budget(host="16MiB", device="4MiB")
    policy = offload.Policy(budget, device="simulated:latest", max_unit_bytes="200KiB")
    offload.wrap(model, policy)
    monkeypatch.setattr(wrapped(model).context.prefetcher, "start_updates", lambda: None)
    twins = ((model, adamw(model)), (plain, adamw(plain)))
    assert first_line_not_reached(TRACED, range(0, 2000, 7), twins) > 30
