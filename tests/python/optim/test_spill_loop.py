"""spill() in training loops: everything that is done with a torch optimizer does the same here.

The states are too large for the memory, in all of these tests.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spilled import assert_same_dicts, assert_same_params, disk_bytes, policy
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from offload.optim import spill

pytestmark = pytest.mark.usefixtures("tiny_states_too")


class Lion(Optimizer):
    """As packages outside of torch write them: no decorators, counters in group and self."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "calls": 0})
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        self.calls += 1
        for group in self.param_groups:
            group["calls"] += 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p.data)
                update = state["exp_avg"].clone().mul_(beta1).add_(p.grad.data, alpha=1 - beta1)
                p.data.add_(torch.sign(update), alpha=-group["lr"] / self.calls)
                state["exp_avg"] = state["exp_avg"] * beta2 + p.grad.data * (1 - beta2)
        return loss


CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "NAdam": (torch.optim.NAdam, {}),
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),
    "Lion": (Lion, {}),
}


class Net(nn.Module):
    """Layers of odd sizes, a frozen one, one without gradients, a 0-dim and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(17, 63)
        self.middle = nn.ModuleList(nn.Linear(63, 63) for _ in range(4))
        self.frozen = nn.Linear(63, 63)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(63, 3)
        self.unused = nn.Linear(40, 40)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.middle:
            x = x + layer(x).tanh()
        y: torch.Tensor = self.last(self.frozen(x * self.scale + self.empty.sum()))
        return y


class Pair:
    """The same model twice, with the spilled and with the real optimizer."""

    def __init__(self, folder: Path, name: str) -> None:
        torch.manual_seed(0)
        self.cls, self.arguments = CLASSES[name]
        self.folder = folder
        self.ours = Net()
        self.theirs = copy.deepcopy(self.ours)
        self.step = 0

    def make(self, params: Callable[[Net], Any] = lambda net: net.parameters(), **kw: Any) -> None:
        kw = {**self.arguments, **kw}
        self.spilled: Any = spill(self.cls, params(self.ours), policy=self.policy, **kw)
        self.real = self.cls(params(self.theirs), **kw)

    @property
    def policy(self) -> Any:
        return policy(self.folder, 64 << 10)

    def both(self) -> Iterator[tuple[Net, Optimizer]]:
        yield self.ours, self.spilled
        yield self.theirs, self.real

    def train(
        self,
        steps: int,
        clip: float | None = None,
        set_to_none: bool = True,
        micro_batches: int = 1,
        after: Callable[[Optimizer], None] = lambda optimizer: None,
    ) -> None:
        for net, optimizer in self.both():
            for step in range(self.step, self.step + steps):
                optimizer.zero_grad(set_to_none=set_to_none)
                for batch in range(micro_batches):
                    loss_of(net, 100 * step + batch).backward()  # type: ignore[no-untyped-call]
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                after(optimizer)
        self.step += steps

    def check(self) -> None:
        assert_same_params([*self.ours.parameters()], [*self.theirs.parameters()])
        assert_same_dicts(self.spilled.state_dict(), self.real.state_dict())
        written, read = disk_bytes(self.spilled)
        assert written > 0
        assert read > 0


def loss_of(net: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(11, 17, generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = net(x).square().mean() * 10
    return loss


@pytest.fixture(params=CLASSES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(tmp_path, request.param)


@pytest.fixture
def adam(tmp_path: Path) -> Pair:
    return Pair(tmp_path, "Adam")


def test_it_is_an_optimizer_of_the_class(adam: Pair) -> None:
    adam.make()
    assert isinstance(adam.spilled, torch.optim.Adam)
    assert adam.spilled.defaults == adam.real.defaults
    assert repr(adam.spilled) == "Spilled" + repr(adam.real)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipping_accumulation_and_zero_grad(
    pair: Pair, clip: float | None, set_to_none: bool
) -> None:
    pair.make()
    pair.train(4, clip=clip, set_to_none=set_to_none, micro_batches=3)
    pair.check()


def groups(net: Net) -> list[dict[str, Any]]:
    return [
        {"params": net.first.parameters(), "lr": 1e-2},
        {"params": list(net.middle.parameters())},
        {"params": [*net.last.parameters(), net.scale, net.empty], "lr": 3e-3},
        {"params": [*net.unused.parameters(), *net.frozen.parameters()]},
    ]


def one_cycle(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    cycles = any(name in optimizer.defaults for name in ("betas", "momentum"))
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=cycles)


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": one_cycle,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_and_groups(pair: Pair, name: str) -> None:
    pair.make(groups)
    for optimizer in (pair.spilled, pair.real):
        optimizer.schedule = SCHEDULERS[name](optimizer)
    pair.train(6, after=lambda optimizer: optimizer.schedule.step())  # type: ignore[attr-defined]
    pair.check()


def test_one_cycle_changes_betas(adam: Pair) -> None:
    """Or else the test above would not see it."""
    adam.make()
    schedule = one_cycle(adam.spilled)
    before = adam.spilled.param_groups[0]["betas"]
    adam.spilled.step()
    schedule.step()
    assert adam.spilled.param_groups[0]["betas"] != before


def test_a_tensor_as_lr(adam: Pair) -> None:
    adam.make(lr=torch.tensor(3e-3), foreach=False)
    adam.train(3)
    adam.check()


def test_named_parameters(pair: Pair) -> None:
    pair.make(lambda net: net.named_parameters())
    pair.train(2)
    pair.check()
    assert "param_names" in pair.spilled.state_dict()["param_groups"][0]


def test_add_param_group_in_training(pair: Pair) -> None:
    pair.make(lambda net: net.middle.parameters())
    pair.train(2)
    for net, optimizer in pair.both():
        optimizer.add_param_group({"params": net.first.parameters(), "lr": 0.05})
    pair.train(2)
    pair.check()


def test_closure(pair: Pair) -> None:
    pair.make()
    losses: list[float] = []
    for net, optimizer in pair.both():
        calls = 0
        for step in range(3):

            def closure(net: Net = net, optimizer: Any = optimizer, step: int = step) -> Any:
                nonlocal calls
                calls += 1
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            losses.append(optimizer.step(closure))
        assert calls == 3
    assert losses[:3] == losses[3:]
    pair.check()
    assert pair.spilled.step() is None


def test_closure_under_no_grad(adam: Pair) -> None:
    adam.make()
    seen = []
    with torch.no_grad():
        adam.spilled.step(lambda: seen.append(torch.is_grad_enabled()))
    assert seen == [True]


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(pair: Pair, overflow: bool) -> None:
    pair.make()
    for net, optimizer in pair.both():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step)).backward()  # type: ignore[no-untyped-call]
            if overflow and step == 2:
                net.first.weight.grad[0] = torch.inf  # type: ignore[index]
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (512.0 if overflow else 1024.0)
    pair.check()


def test_fused_scaling_leaves_the_same_gradients(tmp_path: Path) -> None:
    """The fused kernels divide by the scale in place."""
    pair = Pair(tmp_path, "AdamW-fused")
    pair.make()
    for net, optimizer in pair.both():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(net, 0)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
    grads = [[p.grad for p in net.parameters() if p.grad is not None] for net, _ in pair.both()]
    assert_same_params(*grads)


def test_step_hooks_are_called_once_with_the_optimizer(pair: Pair) -> None:
    pair.make()
    calls: list[tuple[str, Any]] = []
    spilled = pair.spilled

    def pre(optimizer: Any, args: Any, kwargs: Any) -> None:
        calls.append(("pre", optimizer))

    def post(optimizer: Any, args: Any, kwargs: Any) -> None:
        calls.append(("post", optimizer))

    handles = [
        spilled.register_step_pre_hook(pre),
        spilled.register_step_post_hook(post),
        register_optimizer_step_pre_hook(pre),
        register_optimizer_step_post_hook(post),
    ]
    try:
        loss_of(pair.ours, 0).backward()  # type: ignore[no-untyped-call]
        spilled.step()
        assert calls == [(what, spilled) for what in ("pre", "pre", "post", "post")]
    finally:
        for handle in handles:
            handle.remove()
    spilled.step()
    assert len(calls) == 4


def test_a_pre_hook_may_replace_the_arguments(adam: Pair) -> None:
    adam.make()
    adam.spilled.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5.0), {}))
    assert adam.spilled.step() == 5.0


def test_the_profiler_sees_one_step(adam: Pair) -> None:
    adam.make()
    loss_of(adam.ours, 0).backward()  # type: ignore[no-untyped-call]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        adam.spilled.step()
    steps = [e for e in profile.events() if e.name.startswith("Optimizer.step#")]
    assert [e.name for e in steps] == ["Optimizer.step#SpilledAdam.step"]


def test_state_dict_hooks(adam: Pair) -> None:
    adam.make()
    adam.train(2)
    calls: list[str] = []
    spilled = adam.spilled
    spilled.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    spilled.register_state_dict_post_hook(lambda o, d: {**d, "extra": len(d["state"])})
    spilled.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    spilled.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    saved = spilled.state_dict()
    assert saved["extra"] == len(adam.real.state_dict()["state"])
    spilled.load_state_dict(saved)
    assert calls == ["pre", "load pre", "load post"]
    adam.train(2)
    assert_same_params([*adam.ours.parameters()], [*adam.theirs.parameters()])


@pytest.mark.parametrize("through_file", [False, True])
def test_state_dicts_exchange_both_ways(pair: Pair, through_file: bool) -> None:
    pair.make(groups)
    pair.train(3)
    pair.check()
    ours, theirs = pair.spilled.state_dict(), pair.real.state_dict()
    if through_file:
        ours, theirs = through(ours), through(theirs)
    else:
        ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    if pair.cls is Lion:  # its counter is in no state_dict
        pair.make(groups)
        pair.spilled.calls = pair.real.calls = 3
    else:
        pair.make(groups)
    pair.spilled.load_state_dict(theirs)
    pair.real.load_state_dict(ours)
    pair.train(3)
    pair.check()


def through(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_dict_does_not_change_with_later_steps(pair: Pair) -> None:
    pair.make()
    pair.train(2)
    saved = pair.spilled.state_dict()
    kept = copy.deepcopy(saved)
    pair.train(2)
    assert_same_dicts(saved, kept)
    pair.spilled.load_state_dict(saved)
    loaded = copy.deepcopy(pair.spilled.state_dict())
    pair.spilled.step()
    assert_same_dicts(saved, kept)
    assert_same_dicts(loaded, kept)


def test_loading_replaces_everything(adam: Pair) -> None:
    adam.make()
    empty = (adam.spilled.state_dict(), adam.real.state_dict())
    adam.train(2)
    for optimizer, saved in zip((adam.spilled, adam.real), empty, strict=True):
        optimizer.load_state_dict(saved)
    assert_same_dicts(adam.spilled.state_dict(), adam.real.state_dict())
    assert len(adam.spilled.state) == 0
    adam.train(2)
    adam.check()


def test_a_loaded_state_of_another_shape_is_taken(adam: Pair) -> None:
    """amsgrad adds a tensor to each state."""
    adam.make(amsgrad=False)
    adam.train(2)
    for optimizer in (adam.spilled, adam.real):
        for group in optimizer.param_groups:
            group["amsgrad"] = True
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
        optimizer.load_state_dict(saved)
    adam.train(2)
    adam.check()


def test_momentum_that_a_schedule_turns_on(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "SGD")
    pair.make(momentum=0.0, nesterov=False)
    pair.train(2)
    assert_same_dicts(pair.spilled.state_dict(), pair.real.state_dict())
    for _, optimizer in pair.both():
        optimizer.param_groups[0]["momentum"] = 0.8
    pair.train(3)
    pair.check()


def test_parameters_without_gradients_have_no_state(pair: Pair) -> None:
    pair.make()
    pair.train(2)
    for name in ("unused.weight", "frozen.weight"):
        param = pair.ours.get_parameter(name)
        assert (param in pair.spilled.state) == (pair.theirs.get_parameter(name) in pair.real.state)


def test_reading_state_gives_current_copies(adam: Pair) -> None:
    adam.make()
    adam.train(2)
    ours, theirs = adam.ours.first.weight, adam.theirs.first.weight
    found, expected = adam.spilled.state[ours], adam.real.state[theirs]
    assert list(found) == list(expected)
    assert torch.equal(found["exp_avg"], expected["exp_avg"])
    assert len(adam.spilled.state) == len(adam.real.state)
    assert [id(p) for p in adam.spilled.state] == [
        id(p) for p in adam.ours.parameters() if p in adam.spilled.state
    ]
    found["exp_avg"].zero_()
    assert torch.equal(adam.spilled.state[ours]["exp_avg"], expected["exp_avg"])
    with pytest.raises(TypeError):
        found["exp_avg"] = torch.zeros(1)
    assert dict(adam.spilled.state[adam.ours.unused.weight]) == {}
    assert adam.ours.unused.weight not in adam.spilled.state
    with pytest.raises(KeyError):
        adam.spilled.state["no such key"]
    adam.train(1)
    assert torch.equal(adam.spilled.state[ours]["exp_avg"], adam.real.state[theirs]["exp_avg"])


def test_state_can_be_replaced(adam: Pair) -> None:
    adam.make()
    adam.train(2)
    for net, optimizer in adam.both():
        weight = net.first.weight
        state = {k: torch.zeros_like(v) for k, v in optimizer.state[weight].items()}
        optimizer.state[weight] = state
        del optimizer.state[net.last.weight]
    adam.train(2)
    assert_same_params([*adam.ours.parameters()], [*adam.theirs.parameters()])


def test_all_state_can_be_dropped(adam: Pair) -> None:
    from collections import defaultdict

    adam.make()
    adam.train(2)
    for _, optimizer in adam.both():
        optimizer.state = defaultdict(dict)
    assert len(adam.spilled.state) == 0
    adam.train(2)
    adam.check()


def test_random_numbers_are_drawn_as_by_the_class(tmp_path: Path) -> None:
    """Parameters are stepped in the class's order, and making the optimizer draws none."""

    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(torch.randn_like(p), alpha=1e-3)
            return super().step(closure)

    nets = Net(), Net()
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = []
    for i, net in enumerate(nets):
        torch.manual_seed(3)
        kw: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        optimizers.append(
            spill(Noisy, net.parameters(), policy=policy(tmp_path), **kw)
            if i == 0
            else Noisy(net.parameters(), **kw)
        )
        for step in range(3):
            optimizers[-1].zero_grad()
            loss_of(net, step).backward()  # type: ignore[no-untyped-call]
            optimizers[-1].step()
    assert_same_params([*nets[0].parameters()], [*nets[1].parameters()])


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "with gaps", "unaligned"])
def test_layouts(adam: Pair, layout: str) -> None:
    def make() -> nn.Parameter:
        base = torch.randn(8, 6, 12, 12, generator=torch.Generator().manual_seed(0))
        values = {
            "transposed": base.flatten(1).t(),
            "channels_last": base.to(memory_format=torch.channels_last),
            "with gaps": base[:, ::2],
            "unaligned": base.flatten()[3:2000],
        }[layout]
        return nn.Parameter(values)

    ours, theirs = [make() for _ in range(6)], [make() for _ in range(6)]
    spilled = spill(adam.cls, ours, policy=policy(adam.folder, 96 << 10))
    real = adam.cls(theirs)
    for step in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(9 * step + i))
            b.grad = a.grad.clone()
        spilled.step()
        real.step()
    assert_same_params(ours, theirs)
    assert_same_dicts(spilled.state_dict(), real.state_dict())
