"""Updates on the device: the bits of those on the CPU, for every format, in proven order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_updates import first_line_not_reached, small
from torch import nn

import offload
from offload.planner import UpdateRates
from offload.runtime import resources
from offload.runtime.wrapped import wrapped
from offload.tiers.context import RuntimeContext
from offload.tiers.device_tier import DeviceTier
from offload.tiers.device_updates import DeviceUpdates
from offload.tiers.slab import Slab
from offload.tiers.updates import Updates

pytestmark = pytest.mark.own_device
TOKENS = torch.arange(24).view(2, 12)
PACES = ["simulated", "simulated:latest", "simulated:earliest"]
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Odd(nn.Module):
    """Layers of odd sizes, some frozen in part, and some without a gradient in every other step."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 129)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(129, 331), nn.GELU(), nn.Linear(331, 129), nn.LayerNorm(129))
            for _ in range(layers)
        )
        self.blocks[1][0].requires_grad_(False)
        self.head = nn.Linear(129, 3)
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            if i != 2 or self.calls % 4 < 2:
                x = x + block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Odd().to(dtype)


def least(device: str, dtype: torch.dtype, **options: Any) -> tuple[int, int]:
    """The least host and device budgets with which updates of Odd run on the device."""
    found = []
    for big in ({"host": 1 << 13, "device": 1 << 40}, {"host": 1 << 40, "device": 1 << 13}):
        with pytest.raises(offload.BudgetError) as refused:
            offload.wrap(
                make(dtype), offload.Policy(offload.Budget(**big), device=device, **options)
            )
        match = re.search(r"would do is (\d+) bytes", str(refused.value))
        assert match is not None
        found.append(int(match[1]))
    return found[0], found[1]


def offloaded(
    folder: Path,
    device: str = "simulated:latest",
    room: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """Odd with the least budgets, and `room` bytes more on the device."""
    given = {"debug": True, "max_unit_bytes": "150KiB", "update": "device", "swap_dir": folder}
    given = {**given, "io_block_bytes": 1 << 16, **options}
    host, nbytes = least(device, dtype, **given)
    budget = offload.Budget(host=host, device=nbytes + room)
    return offload.wrap(make(dtype), offload.Policy(budget, device=device, **given))


def adamw(**options: Any) -> Optimizer:
    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        params = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
        ]
        return offload.AdamW(groups, lr=1e-2, weight_decay=0.1, **options)

    return make_optimizer


ADAMW = adamw()


def train(
    model: nn.Module, optimizer_of: Optimizer = ADAMW, steps: int = 3, accumulate: int = 2
) -> list[torch.Tensor]:
    """Steps with accumulation, clipping and OneCycle; returns losses, weights and states."""
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    seen = []
    for step in range(steps):
        for micro in range(accumulate):
            loss = model(TOKENS.roll(step + micro)).float().square().mean()
            loss.backward()
            seen.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    seen += [value for kept in state.values() for _, value in sorted(kept.items())]
    return seen + [value.clone() for value in model.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
    )


def context_of(model: nn.Module) -> RuntimeContext:
    return wrapped(model).context


def tier_of(model: nn.Module) -> DeviceTier:
    (tier,) = context_of(model).tiers
    return tier


def check_all_ran_there(model: nn.Module) -> None:
    counters = wrapped(model).counters()
    on_device = context_of(model).updates.on_device
    assert on_device is not None
    assert (counters["updates"], on_device.without_room) == (0, 0)
    assert counters["device_updates"] > 0
    assert tier_of(model).device.stats()["conflicts"] == 0


@pytest.mark.parametrize("device", PACES)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("room", [0, 1 << 21], ids=["least", "double"])
def test_training_is_exact(device: str, lazy: bool, room: int, tmp_path: Path) -> None:
    model = offloaded(tmp_path, device, room, lazy_step=lazy)
    assert same(train(model), train(make()))
    check_all_ran_there(model)
    usage = tier_of(model).room.ring.usage()
    assert usage["peak"] <= usage["budget"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["float32", "int8"])
def test_formats_are_exact(dtype: torch.dtype, state: str, tmp_path: Path) -> None:
    model = offloaded(tmp_path, dtype=dtype)
    optimizer_of = adamw(state_format=state)
    assert same(train(model, optimizer_of), train(make(dtype), optimizer_of))
    check_all_ran_there(model)


@pytest.mark.parametrize("state", ["float32", "int8"])
def test_masters_are_exact(state: str, tmp_path: Path) -> None:
    outcomes = []
    for update in ("cpu", "device"):
        model = offloaded(tmp_path, update=update, param_dtype=torch.bfloat16)
        outcomes.append(train(model, adamw(state_format=state)))
    assert same(*outcomes)
    check_all_ran_there(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_grad_scaler_is_followed(dtype: torch.dtype, tmp_path: Path) -> None:
    outcomes = []
    for model in (make(dtype), offloaded(tmp_path, dtype=dtype)):
        optimizer, scaler = adamw()(model), torch.amp.GradScaler("cpu", init_scale=2.0**9)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(TOKENS.roll(step)).float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        outcomes.append([value.clone() for value in model.state_dict().values()])
    assert same(*outcomes)
    check_all_ran_there(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_inside_the_backward_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    def losses(model: nn.Module) -> list[torch.Tensor]:
        optimizer = adamw(step_in_backward=True)(model)
        for step in range(4):
            model(TOKENS.roll(step)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [value.clone() for value in model.state_dict().values()]

    model = offloaded(tmp_path, dtype=dtype)
    assert same(losses(model), losses(make(dtype)))
    check_all_ran_there(model)


@pytest.mark.parametrize(
    "optimizer_of",
    [
        adamw(amsgrad=True),
        adamw(state_format="bfloat16"),
        lambda model: offload.optim.Lion([p for p in model.parameters() if p.requires_grad]),
    ],
    ids=["amsgrad", "bfloat16", "Lion"],
)
def test_what_has_no_kernel_runs_on_the_cpu(optimizer_of: Optimizer, tmp_path: Path) -> None:
    model = offloaded(tmp_path)
    optimizer = optimizer_of(model)
    plain = make()
    for each, own in ((model, optimizer), (plain, optimizer_of(plain))):
        for step in range(3):
            each(TOKENS.roll(step)).square().mean().backward()
            own.step()
            own.zero_grad()
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    report = offload.report(model)
    assert (report.counters["device_updates"], report.counters["updates"] > 0) == (0, True)
    assert any("updates: all" in note and "on the CPU" in note for note in report.notes)


def test_groups_may_differ_in_what_runs_where(tmp_path: Path) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        params = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": params[::2]}, {"params": params[1::2], "amsgrad": True}]
        return offload.AdamW(groups, lr=1e-2)

    model = offloaded(tmp_path)
    assert same(train(model, optimizer_of), train(make(), optimizer_of))
    counters = offload.report(model).counters
    assert min(counters["updates"], counters["device_updates"]) > 0


REASONS = [
    "copy to the device before its use",
    "copy to the host before a change",
    "reuse of device memory",
    "use before the copy to the host",
]


@pytest.mark.parametrize("device", ["simulated:latest", "simulated:earliest"])
@pytest.mark.parametrize("reason", REASONS)
def test_no_wait_between_streams_may_be_missing(reason: str, device: str, tmp_path: Path) -> None:
    # Comparing checksums makes streams wait for more.
    model = offloaded(tmp_path, device, debug=False)
    tier_of(model).device.omit_waits(reason)
    with pytest.raises(offload.UnorderedAccessError):
        train(model)


def test_those_are_all_the_reasons(tmp_path: Path) -> None:
    model = offloaded(tmp_path)
    train(model)
    assert sorted(tier_of(model).device.stats()["waits"]) == REASONS


def one_slab(model: nn.Module) -> Slab:
    slab = next(u.param_slab for u in context_of(model).units if u.param_slab.swap_object)
    context_of(model).mover.settle(slab)
    context_of(model).mover.fetch(slab)
    return slab


def test_results_come_home_after_copies_from_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for careless in (False, True):
        model = offloaded(tmp_path)
        tier, slab = tier_of(model), one_slab(model)
        if careless:
            monkeypatch.setattr(DeviceTier, "is_reading", lambda self, slab: False)
        tier.drop(slab)
        assert tier.prefetch(slab, 0)
        former = tier.copy_of(slab)  # its memory is not used again
        tier.drop(slab)
        tier.hold_new(slab).ahead = True
        if careless:
            with pytest.raises(offload.UnorderedAccessError, match="copy to the host"):
                tier.send(slab)
        else:
            tier.send(slab)
        assert former is not None


def test_gradients_that_are_still_there_are_not_brought_again(tmp_path: Path) -> None:
    moved = {}
    for room in (0, 1 << 30):
        model = offloaded(tmp_path, room=room)
        train(model, accumulate=1)
        moved[room] = tier_of(model).device.stats()["h2d_bytes"]
        grads = sum(u.grad_bytes for u in context_of(model).units)
    # Twice the states a step, and the parameters once in all.
    state = 2 * grads * 4
    assert moved[1 << 30] <= state + 2 * sum(u.param_bytes for u in context_of(model).units)
    assert moved[0] > moved[1 << 30]


def test_an_update_without_room_is_left_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring = DeviceTier.bring
    monkeypatch.setattr(
        DeviceTier,
        "bring",
        lambda self, slab: "sq of blocks.0" not in slab.name and bring(self, slab),
    )
    model = offloaded(tmp_path)
    assert same(train(model), train(make()))
    counters = offload.report(model).counters
    assert min(counters["updates"], counters["device_updates"]) > 0
    assert any("no room on the device" in note for note in offload.report(model).notes)


@pytest.mark.parametrize("where", ["send", "bring", "drop"])
def test_an_interrupted_update_is_taken_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, run = getattr(DeviceTier, where), DeviceUpdates.run
    inside: list[bool] = []
    hits = iter(range(1 << 30))

    def interrupted(self: DeviceTier, slab: Slab, *args: Any) -> Any:
        if inside and next(hits) == 8:
            raise KeyboardInterrupt
        return original(self, slab, *args)

    def noted(self: DeviceUpdates, job: Any) -> bool:
        inside.append(True)
        try:
            return run(self, job)
        finally:
            inside.pop()

    monkeypatch.setattr(DeviceTier, where, interrupted)
    monkeypatch.setattr(DeviceUpdates, "run", noted)
    plain, model = make(), offloaded(tmp_path)
    interruptions = 0
    for each in (plain, model):
        optimizer = adamw()(each)
        for step in range(3):
            each(TOKENS.roll(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            try:
                each.state_dict()
            except KeyboardInterrupt:
                interruptions += 1
    assert interruptions == 1
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


TRACED = (
    Updates._runs_on_device,
    *(DeviceUpdates.run, DeviceUpdates._compute, DeviceUpdates._bring),
    *(DeviceUpdates._launch, DeviceUpdates._make),
    *(DeviceTier.bring, DeviceTier.ready, DeviceTier.send, DeviceTier.drop),
)


def test_an_update_that_is_interrupted_on_any_line_is_taken_once() -> None:
    """The first lines are those of the first step, the others of all that follow."""
    plain, model = small(), small()
    budget = offload.Budget(host="4MiB", device="4MiB")
    offload.wrap(
        model,
        offload.Policy(
            budget, device="simulated:latest", update="device", debug=True, max_unit_bytes="200KiB"
        ),
    )
    ours = offload.AdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False)
    twins = ((model, ours), (plain, theirs))
    assert first_line_not_reached(TRACED, range(0, 1000, 2), twins) > 100
    check_all_ran_there(model)


def rates(**changed: float) -> UpdateRates:
    given = {"cpu": 1e9, "kernel": 1e12, "to_device": 1e9, "to_host": 1e9}
    return UpdateRates(**{**given, **changed})


@pytest.mark.parametrize("pace", PACES)
def test_auto_shares_them_out(pace: str, tmp_path: Path) -> None:
    """Whatever is measured, the bits are the same."""
    options = {"update": "auto", "max_unit_bytes": "150KiB", "io_block_bytes": 1 << 16}
    budget = offload.Budget(host="8MiB", device="8MiB")
    policy = offload.Policy(budget, device=pace, swap_dir=tmp_path, debug=True, **options)
    model = offload.wrap(make(), policy)
    assert same(train(model), train(make()))
    assert any("GB/s on the CPU" in note for note in offload.report(model).notes)
    assert tier_of(model).device.stats()["conflicts"] == 0


def test_auto_runs_them_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "measure_update_rates", lambda *_: rates())
    budget = offload.Budget(host="8MiB", device="8MiB")
    policy = offload.Policy(
        budget, device="simulated:latest", swap_dir=tmp_path, debug=True, update="auto",
        max_unit_bytes="150KiB", io_block_bytes=1 << 16,
    )  # fmt: skip
    model = offload.wrap(make(), policy)
    assert same(train(model), train(make()))
    counters = offload.report(model).counters
    assert min(counters["updates"], counters["device_updates"]) > 0


def test_auto_without_room_leaves_them_to_the_cpu(tmp_path: Path) -> None:
    options = {"max_unit_bytes": "150KiB", "io_block_bytes": 1 << 16, "swap_dir": tmp_path}
    host, device = least("simulated", torch.float32, **options)
    model = offload.wrap(
        make(),
        offload.Policy(
            offload.Budget(host=host, device=device), device="simulated", update="auto", **options
        ),
    )
    assert not context_of(model).device_units
    assert any("they would need Budget(host=" in note for note in offload.report(model).notes)


def test_budgets_without_room_for_updates_are_refused_with_the_least(tmp_path: Path) -> None:
    options = {"update": "device", "swap_dir": tmp_path, "io_block_bytes": 1 << 16}
    host, device = least("simulated", torch.float32, max_unit_bytes="150KiB", **options)
    for short in ({"host": host - 4096, "device": device}, {"host": host, "device": device - 1}):
        policy = offload.Policy(
            offload.Budget(**short), device="simulated", max_unit_bytes="150KiB", **options
        )
        with pytest.raises(offload.BudgetError, match="smallest"):
            offload.wrap(make(), policy)


def test_the_policy_says_what_it_takes() -> None:
    budget = offload.Budget(host="1GiB")
    with pytest.raises(offload.PolicyError, match="expected one of cpu, device, auto"):
        offload.Policy(budget, update="gpu")
    with pytest.raises(offload.PolicyError, match="needs a device"):
        offload.Policy(budget, update="device")
    assert offload.Policy(budget, update="auto").update == "auto"
