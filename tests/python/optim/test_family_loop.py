"""What training loops do, with each native optimizer, plain and wrapped: the bits of torch."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family as f
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

import offload
from offload import Budget, BudgetError, Policy, UnsupportedError

EACH_RULE = pytest.mark.parametrize(("name", "kwargs"), f.RULES, ids=f.RULE_IDS)
BOTH_PLACES = pytest.mark.parametrize("place", ["memory", "wrapped"])
Run = Callable[[nn.Module, Callable[..., Optimizer]], None]


def both(name: str, kwargs: dict[str, Any], place: str, folder: Path, run: Run) -> None:
    """Run the same loop with ours and with torch's, and compare."""
    ours, theirs = f.net(), f.net()
    if place == "wrapped":
        f.wrapped(ours, folder)
    made: list[Optimizer] = []

    def maker(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
        def made_by(params: Any, **more: Any) -> Optimizer:
            made.append(make(name, params, **f.copied({**kwargs, **more})))
            return made[-1]

        return made_by

    run(ours, maker(f.make))
    run(theirs, maker(f.reference))
    f.assert_same(ours, theirs)
    half = len(made) // 2
    for mine, real in zip(made[:half], made[half:], strict=True):
        f.assert_same_state(mine.state_dict(), real.state_dict())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "lr": 3e-3},
    ]


@BOTH_PLACES
@EACH_RULE
def test_accumulation_clipping_and_groups(
    name: str, kwargs: dict[str, Any], place: str, tmp_path: Path
) -> None:
    def run(model: nn.Module, make: Callable[..., Optimizer]) -> None:
        optimizer = make(groups(model))
        for step in range(4):
            for micro in range(2):
                (loss_of(model, 2 * step + micro) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)

    both(name, kwargs, place, tmp_path, run)


def loss_of(model: nn.Module, step: int) -> Any:
    return f.loss_of(model, step)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.01, total_steps=8, cycle_momentum=bool({"momentum", "betas"} & {*o.defaults})
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=bool({"momentum", "betas"} & {*o.defaults})
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@BOTH_PLACES
@EACH_RULE
def test_schedulers_of_lr_and_of_momentum(
    name: str, kwargs: dict[str, Any], place: str, scheduler: str, tmp_path: Path
) -> None:
    seen: list[set[Any]] = []

    def run(model: nn.Module, make: Callable[..., Optimizer]) -> None:
        optimizer = make(model.parameters(), lr=1e-3)
        schedule = SCHEDULERS[scheduler](optimizer)
        values = set()
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
            group = optimizer.param_groups[0]
            values.add(group["betas"] if "betas" in group else group.get("momentum"))
        seen.append(values)

    both(name, kwargs, place, tmp_path, run)
    if scheduler == "OneCycleLR" and name != "Adagrad":
        assert len(seen[0]) > 3  # or else nothing was shown about momentum


@BOTH_PLACES
@EACH_RULE
def test_groups_added_in_training(
    name: str, kwargs: dict[str, Any], place: str, tmp_path: Path
) -> None:
    def run(model: nn.Module, make: Callable[..., Optimizer]) -> None:
        optimizer = make(model.blocks.parameters())
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.02})
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    both(name, kwargs, place, tmp_path, run)


@BOTH_PLACES
@EACH_RULE
def test_closures_and_hooks(name: str, kwargs: dict[str, Any], place: str, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    calls: list[str] = []

    def run(model: nn.Module, make: Callable[..., Optimizer]) -> None:
        optimizer: Any = make(model.parameters())
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
        losses.append([])
        for step in range(3):

            def closure(step: int = step) -> Any:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            with torch.no_grad():
                losses[-1].append(float(optimizer.step(closure)))

    both(name, kwargs, place, tmp_path, run)
    assert losses[0] == losses[1]
    assert calls == ["pre", "post"] * 6


@BOTH_PLACES
@EACH_RULE
def test_grad_scaler(name: str, kwargs: dict[str, Any], place: str, tmp_path: Path) -> None:
    scales: list[list[float]] = []

    def run(model: nn.Module, make: Callable[..., Optimizer]) -> None:
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales.append([])
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            if step == 2:  # this one is skipped
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales[-1].append(scaler.get_scale())

    both(name, kwargs, place, tmp_path, run)
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > 1


@BOTH_PLACES
@EACH_RULE
def test_resumed_from_a_file(name: str, kwargs: dict[str, Any], place: str, tmp_path: Path) -> None:
    def run(model: nn.Module, make: Callable[..., Optimizer]) -> None:
        optimizer = make(model.parameters())
        for step in range(4):
            if step == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = make(model.parameters())
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    ours, theirs = f.net(), f.net()
    if place == "wrapped":
        f.wrapped(ours, tmp_path)
    run(ours, lambda params: f.make(name, params, **kwargs))
    run(theirs, lambda params: f.reference(name, params, **kwargs))
    f.assert_same(ours, theirs)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("state_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("name", "kwargs"), f.NARROW_RULES, ids=f.RULE_IDS)
def test_copies_of_a_plain_model_go_on_alike(
    name: str, kwargs: dict[str, Any], state_format: str, copier: Callable[[Any], Any]
) -> None:
    model = f.net()
    optimizer = f.make(name, model.parameters(), state_format=state_format, seed=5, **kwargs)

    def steps(model: nn.Module, optimizer: Optimizer, which: range) -> None:
        for step in which:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    steps(model, optimizer, range(2))
    twin, twin_optimizer = copier((model, optimizer))
    steps(model, optimizer, range(2, 4))
    steps(twin, twin_optimizer, range(2, 4))
    f.assert_same(model, twin)
    f.assert_same_state(optimizer.state_dict(), twin_optimizer.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, pickle.dumps])
@pytest.mark.parametrize("place", ["disk", "wrapped"])
def test_copies_of_what_lives_elsewhere_are_refused(
    place: str, copier: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = f.net()
    where = {"policy": f.disk_policy(tmp_path)} if place == "disk" else {}
    if place == "wrapped":
        f.wrapped(model, tmp_path)
    optimizer = f.make("AdamW", model.parameters(), **where)
    with pytest.raises(UnsupportedError, match="state_dict"):
        copier(optimizer)


@BOTH_PLACES
@EACH_RULE
def test_sparse_gradients_are_refused_before_anything_is_updated(
    name: str, kwargs: dict[str, Any], place: str, tmp_path: Path
) -> None:
    dense, sparse = nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True)
    if place == "wrapped":
        f.wrapped(dense, tmp_path)
    optimizer = f.make(name, [*dense.parameters(), sparse.weight], **kwargs)
    before = f.values(dense)
    (dense(sparse(torch.tensor([1, 2]))).sum()).backward()
    with pytest.raises(UnsupportedError, match=f"offload.{name} does not support sparse"):
        optimizer.step()
    assert all(f.same_bits(a, b) for a, b in zip(before, f.values(dense), strict=True))
    assert all("exp_avg" not in state for state in optimizer.state.values())


@EACH_RULE
def test_options_for_other_devices_are_refused(name: str, kwargs: dict[str, Any]) -> None:
    model = f.net()
    for option in ("capturable", "differentiable"):
        group = {"params": model.head.parameters(), option: True}
        with pytest.raises(UnsupportedError, match=f"{option}=True"):
            f.make(name, [group], **kwargs)
    optimizer = f.make(name, model.head.parameters(), **kwargs)
    state = optimizer.state_dict()
    state["param_groups"][0]["differentiable"] = True
    with pytest.raises(UnsupportedError, match="differentiable=True"):
        optimizer.load_state_dict(state)
    assert not optimizer.param_groups[0].get("differentiable")


@pytest.mark.parametrize("flag", [{"foreach": True}, {"fused": True}, {"foreach": False}])
@EACH_RULE
def test_foreach_and_fused_change_nothing(
    name: str, kwargs: dict[str, Any], flag: dict[str, bool]
) -> None:
    if name == "RMSprop" and "fused" in flag:
        with pytest.raises(TypeError, match="fused"):
            f.make(name, f.net().parameters(), **flag)
        return
    ours, theirs = f.net(), f.net()
    for model, optimizer in (
        (ours, f.make(name, ours.parameters(), **kwargs, **flag)),
        (theirs, f.reference(name, theirs.parameters(), **kwargs)),
    ):
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    f.assert_same(ours, theirs)


@pytest.mark.parametrize(
    "arguments", [{"state_format": "float64"}, {"seed": -1}, {"seed": 1 << 64}, {"seed": 0.5}]
)
def test_arguments_beyond_torchs_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        f.make("AdamW", [nn.Parameter(torch.ones(3))], **arguments)


def test_a_loaded_state_must_fit(tmp_path: Path) -> None:
    model = f.Model()
    optimizer = f.make("AdamW", model.parameters())
    f.set_gradients(0, model)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of shape \(3,\)"):
        optimizer.load_state_dict(wrong)
    wrong["param_groups"] = wrong["param_groups"] * 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(wrong)
    f.assert_same_state(optimizer.state_dict(), before)


def test_load_hooks_see_states_as_in_torch() -> None:
    model = f.net()
    optimizer = f.make("AdamW", model.head.parameters(), state_format="int8")
    loss_of(model, 0).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(state["state"][0]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(dict(o.state)))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append(state["state"][0]))
    optimizer.load_state_dict(saved)
    optimizer.state_dict()
    assert seen[0]["exp_avg"].dtype is torch.float32
    assert seen[1][model.head.weight]["exp_avg"].dtype is torch.uint8
    assert seen[2]["exp_avg"].dtype is torch.float32


def test_no_room_for_state_changes_nothing(tmp_path: Path) -> None:
    model = f.Model()
    policy = f.disk_policy(tmp_path)
    small = type(policy)(type(policy.budget)(1 << 20))  # no disk, and too little memory
    optimizer = f.make("Adam", model.parameters(), amsgrad=True, policy=small)
    before = f.values(model)
    f.set_gradients(0, model)
    for _ in range(2):
        with pytest.raises(BudgetError, match="no room for"):
            optimizer.step()
    assert all(f.same_bits(a, b) for a, b in zip(before, f.values(model), strict=True))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("with_folder", [True, False])
def test_the_budget_that_state_beside_adamws_needs_is_named(
    with_folder: bool, tmp_path: Path
) -> None:
    folder = tmp_path if with_folder else None

    def step(host: int) -> None:
        model = offload.wrap(f.Model(), Policy(Budget(host), swap_dir=folder, calibrate_disk=False))
        optimizer = f.make("Adam", model.parameters(), amsgrad=True)
        f.set_gradients(0, model, missing=False)
        optimizer.step()

    with pytest.raises(BudgetError) as error:  # the plan is for AdamW's state, which just fits
        step(smallest_in_memory())
    least = int(str(error.value).split("would do is ")[1].split(" ")[0])
    assert ("swap_dir" in str(error.value)) is not with_folder
    step(least)
    with pytest.raises(BudgetError, match=f"would do is {least} bytes"):
        step(least - 1)


def smallest_in_memory() -> int:
    with pytest.raises(BudgetError) as error:
        offload.wrap(f.Model(), Policy(Budget(4096)))
    return int(str(error.value).split("would do is ")[1].split(" ")[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_forked_child_goes_on_with_its_own_copy() -> None:
    """As it may with torch's optimizers; threads that were there before the fork are not."""
    model = f.Model(scale=200)  # large enough for threads
    optimizer = f.make("AdamW", model.parameters())
    f.set_gradients(0, model)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    f.set_gradients(1, model, twin)
    child = os.fork()
    if child == 0:
        try:
            optimizer.step()
            twin_optimizer.step()
            f.assert_same(model, twin)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    optimizer.step()
