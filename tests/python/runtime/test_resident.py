"""A budget that holds everything: ordinary tensors, no hooks, updates in place; the same bits."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.errors import OffloadError
from offload.runtime.wrapped import wrapped
from offload.tiers.grad_handle import GradHandle

pytestmark = pytest.mark.own_device
TOKENS = torch.arange(24).view(2, 12)
AMPLE = offload.Policy(budget=offload.Budget(host="1GiB"))
LEAST = r"smallest host budget that would do is (\d+) bytes"


def small() -> nn.Module:
    torch.manual_seed(0)
    return t.Stack(layers=3)


def half() -> nn.Module:
    return small().bfloat16()


def spilling(make: t.Model, folder: Path, **options: Any) -> offload.Policy:
    """A policy with which what `make` makes, and its state, is spilled."""
    options |= t.SMALL_BLOCKS
    budget = offload.Budget(host=t.least_budget(make, **options) + (3 << 20))
    return offload.Policy(budget=budget, swap_dir=folder, **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> list[float]:
    """Train `model`; returns the losses."""
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(TOKENS).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_there_are_no_hooks_and_gradients_are_tensors() -> None:
    model = offload.wrap(small(), AMPLE)
    assert wrapped(model).context.resident
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    model(TOKENS).square().mean().backward()
    for param in model.parameters():
        assert type(param) is nn.Parameter
        assert type(param.grad) is torch.Tensor
        assert not param._post_accumulate_grad_hooks


def test_moving_activations_or_spilling_needs_the_hooks(tmp_path: Path) -> None:
    policies = [
        offload.Policy(budget=AMPLE.budget, activations="host"),
        offload.Policy(budget=AMPLE.budget, activations="recompute"),
        spilling(small, tmp_path),
    ]
    for policy in policies:
        model = offload.wrap(small(), policy)
        assert not wrapped(model).context.resident
        model(TOKENS).square().mean().backward()
        assert all(type(p.grad) is GradHandle for p in model.parameters())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: offload.AdamW(p, lr=1e-2),
    "bf16": lambda p: offload.AdamW(p, lr=1e-2, state_format="bfloat16", seed=3),
    "int8": lambda p: offload.AdamW(p, lr=1e-2, state_format="int8"),
    "sgd": lambda p: offload.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: offload.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: offload.optim.spill(torch.optim.NAdam, p, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("make", [small, half], ids=["fp32", "bf16"])
def test_the_bits_are_those_of_a_spilled_model(kind: str, make: t.Model, tmp_path: Path) -> None:
    policy = spilling(make, tmp_path)
    models = [offload.wrap(make(), AMPLE), offload.wrap(make(), policy)]
    assert [wrapped(m).context.resident for m in models] == [True, False]
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in models]
    losses = [steps(m, o) for m, o in zip(models, optimizers, strict=True)]
    assert losses[0] == losses[1]
    assert_same(*models)
    states = [o.state_dict()["state"] for o in optimizers]
    for number, state in states[0].items():
        for name, value in state.items():
            other = states[1][number][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("make", [small, half], ids=["fp32", "bf16"])
def test_the_bits_are_those_of_a_plain_model(make: t.Model) -> None:
    plain, ours = make(), offload.wrap(make(), AMPLE)
    optimizers = [offload.AdamW(m.parameters(), lr=1e-2) for m in (plain, ours)]
    assert steps(plain, optimizers[0]) == steps(ours, optimizers[1])
    assert_same(plain, offload.unwrap(ours))


def test_narrowed_parameters_are_those_of_a_spilled_model(tmp_path: Path) -> None:
    policies = [
        offload.Policy(AMPLE.budget, param_dtype=torch.bfloat16),
        spilling(small, tmp_path, param_dtype=torch.bfloat16),
    ]
    models = [offload.wrap(small(), policy) for policy in policies]
    assert [wrapped(m).context.resident for m in models] == [True, False]
    for model in models:
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        steps(model, optimizer)
        with torch.no_grad():
            model.head.weight[:8].mul_(1.5)
        steps(model, optimizer)
    assert_same(*models)
    for model in models:
        offload.unwrap(model)
    assert_same(*models)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert a.dtype is torch.float32
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_the_exact_budget_has_room_for_the_state() -> None:
    with pytest.raises(offload.BudgetError) as refused:
        offload.wrap(small(), offload.Policy(budget=offload.Budget(host=1 << 20)))
    found = re.search(LEAST, str(refused.value))
    assert found is not None
    least = int(found[1])
    model = offload.wrap(small(), offload.Policy(budget=offload.Budget(host=least)))
    steps(model, offload.AdamW(model.parameters()))
    assert wrapped(model).counters()["arena_peak_bytes"] <= least


def test_step_in_backward_is_the_same_step() -> None:
    models = [offload.wrap(small(), AMPLE) for _ in range(2)]
    for model, early in zip(models, (False, True), strict=True):
        optimizer = offload.AdamW(model.parameters(), lr=1e-2, step_in_backward=early)
        for _ in range(3):
            model(TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*models)


def test_a_second_optimizer_takes_the_state_over() -> None:
    model = offload.wrap(small(), AMPLE)
    old, new = (offload.AdamW(model.parameters(), lr=1e-2) for _ in range(2))
    steps(model, old)
    steps(model, new)
    with pytest.raises(OffloadError, match="another optimizer has updated"):
        steps(model, old)
    old.load_state_dict(new.state_dict())
    steps(model, old)


def test_what_was_assigned_to_data_stays() -> None:
    plain, ours = small(), offload.wrap(small(), AMPLE)
    for model in (plain, ours):
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        steps(model, optimizer, 1)
        for param in model.parameters():
            param.data = param.data * 2
        steps(model, optimizer, 1)
    assert_same(plain, ours)
    for param in ours.parameters():
        param.data = param.data * 2
    for param in plain.parameters():
        param.data.mul_(2)
    assert_same(plain, offload.unwrap(ours))


def test_a_change_of_16_bit_values_reaches_the_master_copy(tmp_path: Path) -> None:
    models = [offload.wrap(half(), AMPLE), offload.wrap(half(), spilling(half, tmp_path))]
    for model in models:
        optimizer = offload.AdamW(model.parameters(), lr=1e-2)
        steps(model, optimizer)
        with torch.no_grad():
            model.head.weight.mul_(1.5)
        with offload.materialize(model.embed):
            model.embed.weight.data.add_(1)
        steps(model, optimizer)
    assert_same(*models)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    model = offload.wrap(small(), AMPLE)
    optimizer = offload.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer)
    loss = model(TOKENS).square().mean()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_stay_when_it_is_unwrapped() -> None:
    plain, ours = small(), offload.wrap(small(), AMPLE)
    for model in (plain, ours):
        model(TOKENS).square().mean().backward()
    offload.unwrap(ours)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    del model, ours
    gc.collect()
