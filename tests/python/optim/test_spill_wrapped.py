"""spill() on wrapped models: the bits of plain training with the real class."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from spilled import assert_same_dicts
from torch import nn
from torch.optim import Optimizer

import offload
from offload import BudgetError, OffloadError, Policy, PolicyError
from offload.optim import spill
from offload.runtime.wrapped import wrapped
from offload.tiers.unit import SpilledParameter

MIB = 2**20
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "NAdam": (torch.optim.NAdam, {"lr": 1e-3}),
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),
    "Adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}
SOME = ["NAdam", "AdamW-fused"]


class Block(nn.Module):
    """Two matrices of 256 KiB, which are one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(256)
        self.mix = nn.Linear(256, 256)
        self.out = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.out(self.mix(self.norm(x)).tanh())
        return y


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(8)])


def loop(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range = range(4),
    clip: float | None = None,
    micro_batches: int = 1,
    set_to_none: bool = True,
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        for batch in range(micro_batches):
            x = torch.randn(4, 256, generator=torch.Generator().manual_seed(10 * step + batch))
            loss = (model(x) - x.roll(1)).square().mean() * 100
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        if clip is not None:
            losses.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    return losses


def policy(folder: Path | None, host: int, **kw: Any) -> Policy:
    return Policy(
        offload.Budget(host), swap_dir=folder, io_block_bytes=1 << 16, calibrate_disk=False, **kw
    )


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_models(ours: nn.Module, theirs: nn.Module) -> None:
    found = state_of(ours)
    for name, value in theirs.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("host", [5 * MIB, 11 * MIB, 64 * MIB], ids=["all", "state", "nothing"])
@pytest.mark.parametrize("name", CLASSES)
def test_same_bits(name: str, host: int, tmp_path: Path) -> None:
    cls, kw = CLASSES[name]
    plain = make_model()
    real = cls(plain.parameters(), **kw)
    expected = loop(plain, real)
    model = offload.wrap(make_model(), policy(tmp_path, host, debug=True))
    spilled = spill(cls, model.parameters(), **kw)
    assert loop(model, spilled) == expected
    assert_same_models(model, plain)
    assert_same_dicts(spilled.state_dict(), real.state_dict())
    counters = wrapped(model).counters()
    assert counters["arena_peak_bytes"] <= host
    spills = {k for k, v in wrapped(model).context.plan.disk_bytes().items() if v}
    assert (
        spills
        == {
            5 * MIB: {"parameters", "gradients", "optimizer state"},
            11 * MIB: {"optimizer state"},
            64 * MIB: set(),
        }[host]
    )


@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_clipping_and_accumulation(
    name: str, clip: float | None, set_to_none: bool, tmp_path: Path
) -> None:
    cls, kw = CLASSES[name]
    plain = make_model()
    expected = loop(
        plain, cls(plain.parameters(), **kw), clip=clip, micro_batches=2, set_to_none=set_to_none
    )
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB, debug=True))
    spilled = spill(cls, model.parameters(), **kw)
    found = loop(model, spilled, clip=clip, micro_batches=2, set_to_none=set_to_none)
    assert found == expected
    assert_same_models(model, plain)


@pytest.mark.parametrize("name", SOME)
def test_grad_scaler(name: str, tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: Optimizer) -> list[torch.Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        after = []
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
            scaler.scale((model(x) - x).square().mean()).backward()  # type: ignore[no-untyped-call]
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
            after += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return after

    cls, kw = CLASSES[name]
    plain = make_model()
    expected = run(plain, cls(plain.parameters(), **kw))
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB, debug=True))
    found = run(model, spill(cls, model.parameters(), **kw))
    assert_same_models(model, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_that_the_step_changes_stay_changed(tmp_path: Path) -> None:
    class Decaying(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(0.5).add_(p, alpha=0.01)
            return super().step(closure)

    def run(model: nn.Module, optimizer: Optimizer, clip: float | None) -> list[torch.Tensor]:
        for step in range(3):  # gradients go on accumulating
            x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
            (model(x) - x).square().mean().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for clip in (None, 0.01):
        plain = make_model()
        expected = run(plain, Decaying(plain.parameters(), lr=0.1, momentum=0.9), clip)
        model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB, debug=True))
        kw: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        found = run(model, spill(Decaying, model.parameters(), **kw), clip)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_same_models(model, plain)


def test_gradients_assigned_by_hand(tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: Optimizer) -> None:
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    plain = make_model()
    run(plain, torch.optim.NAdam(plain.parameters()))
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB, debug=True))
    run(model, spill(torch.optim.NAdam, model.parameters()))
    assert_same_models(model, plain)


def test_parameters_are_spilled_again_after_the_step(tmp_path: Path) -> None:
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB))
    optimizer = spill(torch.optim.NAdam, model.parameters())
    before = [type(p) for p in model.parameters()]
    assert SpilledParameter in before
    loop(model, optimizer, range(2))
    assert [type(p) for p in model.parameters()] == before
    assert all(not unit.forward_locks for unit in wrapped(model).context.units)
    assert all(slab.locks == 0 for slab in wrapped(model).context.mover._spillable)


def test_state_dicts_exchange(tmp_path: Path) -> None:
    plain = make_model()
    real = torch.optim.NAdam(plain.parameters())
    loop(plain, real, range(3))
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB, debug=True))
    spilled = spill(torch.optim.NAdam, model.parameters())
    loop(model, spilled, range(3))
    ours, theirs = copy.deepcopy(spilled.state_dict()), copy.deepcopy(real.state_dict())
    assert_same_dicts(ours, theirs)
    spilled = spill(torch.optim.NAdam, model.parameters())
    spilled.load_state_dict(theirs)
    real = torch.optim.NAdam(plain.parameters())
    real.load_state_dict(ours)
    loop(plain, real, range(3, 6))
    loop(model, spilled, range(3, 6))
    assert_same_models(model, plain)
    assert_same_dicts(spilled.state_dict(), real.state_dict())


def test_state_over_unwrap(tmp_path: Path) -> None:
    plain = make_model()
    loop(plain, torch.optim.NAdam(plain.parameters()))
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB))
    optimizer = spill(torch.optim.NAdam, model.parameters())
    loop(model, optimizer, range(2))
    saved = optimizer.state_dict()
    model = offload.unwrap(model)
    with pytest.raises(OffloadError, match=r"before offload.unwrap"):
        loop(model, optimizer, range(2, 3))
    with pytest.raises(OffloadError, match=r"before offload.unwrap"):
        optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert all("exp_avg" in state for state in optimizer.state.values())


def test_training_goes_on_after_unwrap(tmp_path: Path) -> None:
    plain = make_model()
    loop(plain, torch.optim.NAdam(plain.parameters()))
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB))
    optimizer = spill(torch.optim.NAdam, model.parameters())
    loop(model, optimizer, range(2))
    saved = optimizer.state_dict()
    model = offload.unwrap(model)
    optimizer.load_state_dict(saved)
    loop(model, optimizer, range(2, 4))
    assert_same_models(model, plain)


def test_a_dropped_optimizer_gives_its_places_back(tmp_path: Path) -> None:
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB))
    store = wrapped(model).context.store
    assert store is not None
    objects = set()
    for _ in range(4):
        optimizer = spill(torch.optim.NAdam, model.parameters())
        loop(model, optimizer, range(1))
        del optimizer
        gc.collect()
        objects.add(store.stats()["objects"])
    assert len(objects) == 1
    home = wrapped(model).context.state_home
    assert home is not None
    home.make_slab("the next one", 4096)
    assert store.stats()["objects"] < objects.pop()


def test_beside_the_native_optimizer(tmp_path: Path) -> None:
    """Matrices by one class, the rest by another, as with Muon."""

    def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        return matrices, [p for p in model.parameters() if p.dim() != 2]

    def run(model: nn.Module, muon: Optimizer, adam: Optimizer) -> None:
        for step in range(3):
            x = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
            (model(x) - x).square().mean().backward()
            for optimizer in (muon, adam):
                optimizer.step()
            for optimizer in (muon, adam):
                optimizer.zero_grad()

    plain = make_model()
    matrices, others = split(plain)
    run(plain, torch.optim.Muon(matrices), torch.optim.AdamW(others, foreach=False))
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB, debug=True))
    matrices, others = split(model)
    run(model, spill(torch.optim.Muon, matrices), offload.AdamW(others))
    assert_same_models(model, plain)


def test_a_policy_is_only_for_plain_parameters(tmp_path: Path) -> None:
    model = offload.wrap(make_model(), policy(tmp_path, 5 * MIB))
    other = nn.Linear(4, 4)
    asked = policy(tmp_path, MIB)
    with pytest.raises(PolicyError, match="policy that the model was wrapped with"):
        spill(torch.optim.NAdam, model.parameters(), policy=asked)
    with pytest.raises(PolicyError, match="belongs to no wrapped model"):
        spill(torch.optim.NAdam, [*model.parameters(), *other.parameters()])
    mixed = spill(torch.optim.NAdam, [*model.parameters(), *other.parameters()], policy=asked)
    other(torch.ones(4)).sum().backward()
    loop(model, mixed, range(2))
    assert len(mixed.state) == len(list(model.parameters()))


def test_state_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    """Everything is pinned, with room for two moments; there is no disk for a third."""
    plain = make_model()
    params = sum(p.numel() * 4 for p in plain.parameters())
    model = offload.wrap(make_model(), policy(None, 4 * params + MIB))
    kw: dict[str, Any] = {"amsgrad": True}
    optimizer = spill(torch.optim.Adam, model.parameters(), **kw)
    with pytest.raises(BudgetError, match=r"\d+ bytes are needed, \d+ are left"):
        loop(model, optimizer)
