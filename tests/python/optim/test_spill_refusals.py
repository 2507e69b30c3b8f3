"""What spill() refuses, with which words, and that nothing has changed then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spilled import assert_same_params, parameters, policy, set_gradients
from torch import nn
from torch.optim import Optimizer

import offload
from offload import BudgetError, PolicyError, UnsupportedError
from offload.optim import spill


class Base(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-6})

    def with_gradient(self) -> list[torch.Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.grad is not None]


class Sharpness(Base):
    """Needs its closure, after it has moved the parameters (Foret et al. 2021)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        params = self.with_gradient()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        moves = [p.grad / norm for p in params]
        for p, move in zip(params, moves, strict=True):
            p.add_(move)
        with torch.enable_grad():
            loss = closure()
        for p, move in zip(params, moves, strict=True):
            p.sub_(move).sub_(p.grad, alpha=0.1)
        return loss


class ClipsGlobally(Base):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        norm = torch.stack([p.grad.norm() for p in self.with_gradient()]).norm()
        for p in self.with_gradient():
            p.sub_(p.grad / norm)


class AdaptsGroup(Base):
    """Keeps in its group what it sums over the parameters (Defazio & Mishchenko 2023)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            d = group["d"]
            for p in group["params"]:
                p.sub_(p.grad, alpha=d)
                d += p.grad.abs().sum().item() * 1e-3
            group["d"] = d


class KeepsAverage(Base):
    """Keeps state under a key of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.with_gradient():
            p.sub_(p.grad, alpha=0.1)
        self.state["average"]["norm"] = torch.ones(1)


class LinesUp(Base):
    """Evaluates its closure twice, if it is given one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                closure()
                loss = closure()
        for p in self.with_gradient():
            p.sub_(p.grad, alpha=0.1)
        return loss


class WantsClosure(Base):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize("cls", [Sharpness, ClipsGlobally, AdaptsGroup, KeepsAverage, WantsClosure])
def test_classes_that_need_all_parameters(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"{cls.__name__} cannot be spilled: its step does"):
        spill(cls, parameters(), policy=policy(tmp_path))


def test_lbfgs_and_sparse_adam(tmp_path: Path) -> None:
    for cls, words in (
        (torch.optim.LBFGS, "all parameters at once"),
        (torch.optim.SparseAdam, "sparse"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            spill(cls, parameters(), policy=policy(tmp_path))


def test_a_closure_that_is_not_just_evaluated_first(tmp_path: Path) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, real = spill(LinesUp, ours, policy=policy(tmp_path)), LinesUp(theirs)
    set_gradients(0, ours, theirs)
    with pytest.raises(UnsupportedError, match="closure"):
        optimizer.step(lambda: 1.0)
    assert_same_params(ours, theirs)
    optimizer.step()
    real.step()
    assert_same_params(ours, theirs)


def test_what_is_no_optimizer_class(tmp_path: Path) -> None:
    some: Any
    for some in (nn.Linear, Optimizer, torch.optim.Adam(parameters()), None):
        with pytest.raises(TypeError, match=r"torch.optim.Optimizer"):
            spill(some, parameters(), policy=policy(tmp_path))


def test_classes_that_spill_by_themselves(tmp_path: Path) -> None:
    spilled = type(spill(torch.optim.SGD, parameters(), policy=policy(tmp_path)))
    for cls in (offload.AdamW, spilled):
        with pytest.raises(UnsupportedError, match="needs no spill"):
            spill(cls, parameters(), policy=policy(tmp_path))


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_options(option: str, tmp_path: Path) -> None:
    kw: dict[str, Any] = {option: True}
    with pytest.raises(UnsupportedError, match=f"{option}=True"):
        spill(torch.optim.NAdam, parameters(), policy=policy(tmp_path), **kw)
    params, kept = parameters(), parameters()
    optimizer = spill(torch.optim.NAdam, params[:3], policy=policy(tmp_path))
    with pytest.raises(UnsupportedError, match=f"{option}=True"):
        optimizer.add_param_group({"params": params[3:], option: True})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][option] = True
    set_gradients(0, params)
    with pytest.raises(UnsupportedError, match=f"{option}=True"):
        optimizer.step()
    assert_same_params(params, kept)


class Special(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Parameter(torch.empty(3, device="meta")),
        lambda: nn.Parameter(torch.eye(3).to_sparse()),
        lambda: Special(torch.ones(3)),
    ],
    ids=["device", "sparse", "subclass"],
)
def test_parameters(make: Callable[[], nn.Parameter], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"shape \(3"):
        spill(torch.optim.NAdam, [make()], policy=policy(tmp_path))
    optimizer = spill(torch.optim.NAdam, parameters(), policy=policy(tmp_path))
    with pytest.raises(UnsupportedError, match=r"shape \(3"):
        optimizer.add_param_group({"params": [make()]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_before_anything_is_updated(cls: Any, tmp_path: Path) -> None:
    params, kept = parameters(), parameters()
    set_gradients(0, params)
    table = nn.Embedding(20, 8, sparse=True)
    optimizer = spill(cls, [*params, table.weight], policy=policy(tmp_path))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        optimizer.step()
    assert_same_params(params, kept)


def test_plain_parameters_need_a_policy() -> None:
    for cls in (torch.optim.NAdam, torch.optim.Adagrad):
        with pytest.raises(PolicyError, match=r"spill\(policy=...\)"):
            spill(cls, parameters())


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies(copier: Callable[[Any], Any], tmp_path: Path) -> None:
    optimizer = spill(torch.optim.NAdam, parameters(), policy=policy(tmp_path))
    with pytest.raises(UnsupportedError, match="state_dict"):
        copier(optimizer)


def test_state_of_other_kinds_of_tensors(tmp_path: Path) -> None:
    class Halves(torch.Tensor):
        pass

    class KeepsHalves(Base):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.with_gradient():
                self.state[p]["half"] = p.detach().clone().as_subclass(Halves)

    params = parameters([(200, 200)])
    optimizer = spill(KeepsHalves, params, policy=policy(tmp_path))
    set_gradients(0, params)
    with pytest.raises(UnsupportedError, match="state of type Halves"):
        optimizer.step()
    assert list(optimizer.state[params[0]]) == ["half"]  # kept, in memory


@pytest.mark.usefixtures("tiny_states_too")
def test_a_budget_that_one_parameter_exceeds(tmp_path: Path) -> None:
    params = parameters([(50, 50)])
    optimizer = spill(torch.optim.NAdam, params, policy=policy(tmp_path, 16 << 10))
    set_gradients(0, params)
    with pytest.raises(BudgetError, match=r"no room for optimizer state .*\(50, 50\)"):
        optimizer.step()
    optimizer = spill(torch.optim.NAdam, params, policy=policy(None, 16 << 10))
    with pytest.raises(BudgetError, match=r"\d+ bytes are needed, \d+ are left"):
        optimizer.step()
