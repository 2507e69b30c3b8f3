"""The native optimizers against torch's for-loop path, bit for bit, wherever the state lives."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import family as f
import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from offload import OffloadError, UnsupportedError

STEPS = 4


def cases() -> Iterator[Any]:
    for name, kwargs, about in f.samples():
        yield pytest.param(name, kwargs, id=f"{name}-{about}".replace(" ", "_"))


def placed(place: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and arguments of its optimizer, whose state lives in `place`."""
    if place == "wrapped":
        return f.wrapped(f.Model(), folder), {}
    return f.Model(), {} if place == "memory" else {"policy": f.disk_policy(folder)}


@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
@pytest.mark.parametrize(("name", "kwargs"), list(cases()))
def test_same_bits_as_torch(name: str, kwargs: dict[str, Any], place: str, tmp_path: Path) -> None:
    theirs = f.Model()
    ours, where = placed(place, tmp_path)
    optimizer = f.make(name, ours.parameters(), **f.copied(kwargs), **where)
    real = f.reference(name, theirs.parameters(), **f.copied(kwargs))
    for step in range(STEPS):
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
        f.assert_same(ours, theirs)
    f.assert_same_state(optimizer.state_dict(), real.state_dict())


@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
@pytest.mark.parametrize(("name", "kwargs"), f.RULES, ids=f.RULE_IDS)
def test_state_goes_both_ways_between_torch_and_us(
    name: str, kwargs: dict[str, Any], place: str, tmp_path: Path
) -> None:
    theirs = f.Model()
    ours, where = placed(place, tmp_path)
    real = f.reference(name, theirs.parameters(), **kwargs)
    for step in range(2):
        f.set_gradients(step, ours, theirs)
        real.step()
    with torch.no_grad():
        for param, value in zip(ours.parameters(), f.values(theirs), strict=True):
            param.copy_(value)
    optimizer = f.make(name, ours.parameters(), **where)
    optimizer.load_state_dict(real.state_dict())  # options too: momentum, amsgrad
    for step in range(2, 4):
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
    f.assert_same(ours, theirs)
    again = f.reference(name, theirs.parameters())
    again.load_state_dict(deepcopy(optimizer.state_dict()))  # torch's shares the tensors
    for step in range(4, 6):
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        again.step()
    f.assert_same(ours, theirs)
    f.assert_same_state(optimizer.state_dict(), again.state_dict())
    if place == "disk":
        stats = optimizer._home.store.stats()  # type: ignore[attr-defined]
        assert stats["bytes_written"] > 0
        assert stats["bytes_read"] > 0


@pytest.mark.parametrize(("name", "kwargs"), f.RULES, ids=f.RULE_IDS)
def test_state_dict_before_the_first_step_is_torchs(name: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = f.Model(), f.Model()
    optimizer = f.make(name, ours.parameters(), **kwargs)
    real = f.reference(name, theirs.parameters(), **kwargs)
    f.assert_same_state(optimizer.state_dict(), real.state_dict())
    assert {**optimizer.param_groups[0], "params": 0, "foreach": False} == {
        **real.param_groups[0],
        "params": 0,
    }


def errors() -> Iterator[Any]:
    for info in optim_db:
        if info.name not in f.OURS or info.optim_error_inputs_func is None:
            continue
        for sample in info.optim_error_inputs_func("cpu", torch.float32):
            if sample.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
                about = sample.optimizer_error_input.desc
                yield pytest.param(info.name, sample, id=f"{info.name}-{about}".replace(" ", "_"))


@pytest.mark.parametrize(("name", "sample"), list(errors()))
def test_same_errors_as_torch(name: str, sample: Any) -> None:
    given = sample.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(1))]
    if sample.error_type is UserWarning:
        with pytest.warns(UserWarning, match=sample.error_regex):
            f.make(name, params, **given.kwargs)
        return
    with pytest.raises(sample.error_type, match=sample.error_regex):
        f.make(name, params, **given.kwargs)


@pytest.mark.parametrize("kwargs", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
def test_lion_refuses_what_makes_no_sense(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        f.make("Lion", [nn.Parameter(torch.ones(3))], **kwargs)


@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
def test_groups_that_keep_different_states(place: str, tmp_path: Path) -> None:
    """Within one unit: momentum for some parameters, none for others."""
    theirs = f.Model()
    ours, where = placed(place, tmp_path)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        params = list(model.parameters())
        return [
            {"params": params[::3], "momentum": 0.9, "nesterov": True},
            {"params": params[1::3]},
            {"params": params[2::3], "momentum": 0.5, "dampening": 0.5, "maximize": True},
        ]

    optimizer = f.make("SGD", groups(ours), lr=0.1, **where)
    real = f.reference("SGD", groups(theirs), lr=0.1)
    for step in range(6):
        f.set_gradients(step, ours, theirs)
        if step == 3:  # from now on others have it
            for group in (*optimizer.param_groups, *real.param_groups):
                group["momentum"] = 0.0 if group["momentum"] else 0.7
                group["nesterov"] = False
        optimizer.step()
        real.step()
        f.assert_same(ours, theirs)
    f.assert_same_state(optimizer.state_dict(), real.state_dict())


@pytest.mark.parametrize("place", ["memory", "wrapped"])
def test_two_optimizers_share_a_model(place: str, tmp_path: Path) -> None:
    theirs = f.Model()
    ours, _ = placed(place, tmp_path)

    def pair(make: Any, model: nn.Module) -> list[torch.optim.Optimizer]:
        params = list(model.parameters())
        return [make("AdamW", params[::2]), make("SGD", params[1::2], lr=0.1, momentum=0.9)]

    for step in range(6):
        if step % 3 == 0:  # new ones begin anew, without anybody having cleaned up
            mine, real = pair(f.make, ours), pair(f.reference, theirs)
        f.set_gradients(step, ours, theirs)
        for optimizer in (*mine, *real):
            optimizer.step()
        f.assert_same(ours, theirs)


def test_two_optimizers_of_one_wrapped_parameter_are_noticed(tmp_path: Path) -> None:
    model = f.wrapped(f.Model(), tmp_path)
    first, second = (f.make("AdamW", model.parameters()) for _ in "ab")
    for optimizer in (first, second):
        f.set_gradients(0, model)
        optimizer.step()
    before = f.values(model)
    f.set_gradients(1, model)
    steps = [float(state["step"]) for state in first.state.values()]
    with pytest.raises(OffloadError, match="another optimizer has updated parts"):
        first.step()
    assert [float(state["step"]) for state in first.state.values()] == steps
    assert all(f.same_bits(a, b) for a, b in zip(before, f.values(model), strict=True))
    second.step()


def test_a_policy_is_for_plain_models(tmp_path: Path) -> None:
    model = f.wrapped(f.Model(), tmp_path)
    optimizer = f.make("AdamW", model.parameters(), policy=f.disk_policy(tmp_path))
    f.set_gradients(0, model)
    with pytest.raises(UnsupportedError, match="plain models"):
        optimizer.step()


def test_state_moves_along_when_a_model_is_wrapped_in_training(tmp_path: Path) -> None:
    ours, theirs = f.Model(), f.Model()
    optimizer = f.make("Adam", ours.parameters(), amsgrad=True)
    real = f.reference("Adam", theirs.parameters(), amsgrad=True)
    for step in range(4):
        if step == 2:
            f.wrapped(ours, tmp_path)
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
    f.assert_same(ours, theirs)
    f.assert_same_state(optimizer.state_dict(), real.state_dict())
    assert all(list(state) == ["step"] for state in optimizer.state.values())
