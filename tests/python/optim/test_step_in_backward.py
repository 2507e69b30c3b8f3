"""step_in_backward: the bits of a step after the backward, and gradients that cannot be misused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.tiers.spent_grad import SpentGrad

Make = Callable[[], nn.Module]


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(8)]
    )


def tied() -> nn.Module:
    model = stack()
    model[7][0].weight = model[0][0].weight
    return model


def wrap(model: nn.Module, swap_dir: Path, **policy: Any) -> nn.Module:
    budget = offload.Budget(host="20MiB")
    return offload.wrap(model, offload.Policy(budget, swap_dir=swap_dir, debug=True, **policy))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, zero: bool = True
) -> tuple[list[float], dict[str, torch.Tensor]]:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (s + 1))
    data, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        loss = model(torch.randn(4, 256, generator=data)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        if zero:
            optimizer.zero_grad()
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), name


RULES: list[tuple[type[Any], dict[str, Any]]] = [
    (offload.optim.AdamW, {"lr": 1e-2}),
    (offload.optim.AdamW, {"lr": 1e-2, "state_format": "int8"}),
    (offload.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
]


@pytest.mark.parametrize(("cls", "options"), RULES, ids=["adamw", "adamw-int8", "sgd"])
@pytest.mark.parametrize("make", [stack, tied], ids=["stack", "tied"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_wrapped_models_get_the_bits_of_a_later_step(
    cls: type[Any], options: dict[str, Any], make: Make, lazy: bool, tmp_path: Path
) -> None:
    later = wrap(make(), tmp_path)
    expected = train(later, cls(later.parameters(), **options))
    model = wrap(make(), tmp_path, lazy_step=lazy)
    found = train(model, cls(model.parameters(), step_in_backward=True, **options))
    assert_same(found, expected)
    assert offload.report(model).as_dict()["disk_write_bytes"] > 0


@pytest.mark.parametrize(("cls", "options"), RULES, ids=["adamw", "adamw-int8", "sgd"])
def test_plain_models_get_the_bits_of_a_later_step(cls: type[Any], options: dict[str, Any]) -> None:
    later, model = tied(), tied()
    expected = train(later, cls(later.parameters(), **options))
    assert_same(train(model, cls(model.parameters(), step_in_backward=True, **options)), expected)


def test_an_optimizer_may_be_made_before_wrap(tmp_path: Path) -> None:
    later = stack()
    expected = train(later, offload.AdamW(later.parameters()))
    model = stack()
    optimizer = offload.AdamW(model.parameters(), step_in_backward=True)
    assert_same(train(wrap(model, tmp_path), optimizer), expected)


def test_gradients_are_never_stored(tmp_path: Path) -> None:
    """16 bytes read and 12 written per parameter, of what is on disk."""
    moved = {}
    for step_in_backward in (False, True):
        model = wrap(stack(), tmp_path)
        optimizer = offload.AdamW(model.parameters(), step_in_backward=step_in_backward)
        train(model, optimizer, steps=2)
        before = offload.report(model).as_dict()
        train(model, optimizer, steps=2)
        after = offload.report(model).as_dict()
        moved[step_in_backward] = after["disk_write_bytes"] - before["disk_write_bytes"]
    gradients = offload.report(model).plan.disk_bytes()["gradients"]
    assert gradients > 0
    assert moved[False] - moved[True] >= 2 * 0.9 * gradients


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_gradients_cannot_be_read_or_clipped(wrapped: bool, tmp_path: Path) -> None:
    model = wrap(stack(), tmp_path) if wrapped else stack()
    optimizer = offload.AdamW(model.parameters(), step_in_backward=True)
    model(torch.randn(4, 256)).square().mean().backward()
    grad = next(model.parameters()).grad
    assert isinstance(grad, SpentGrad)
    assert grad.shape == next(model.parameters()).shape
    with pytest.raises(offload.errors.SpilledTensorError, match="step_in_backward=False"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(offload.errors.SpilledTensorError, match="not kept"):
        grad.norm()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_accumulation_is_refused_by_name(wrapped: bool, tmp_path: Path) -> None:
    model = wrap(stack(), tmp_path) if wrapped else stack()
    optimizer = offload.AdamW(model.parameters(), step_in_backward=True)
    model(torch.randn(4, 256)).square().mean().backward()
    with pytest.raises(offload.errors.UnsupportedError, match="another gradient before"):
        model(torch.randn(4, 256)).square().mean().backward()
    optimizer.step()
    model(torch.randn(4, 256)).square().mean().backward()  # a step of its own


def test_zero_grad_is_not_needed(tmp_path: Path) -> None:
    later, model = stack(), wrap(stack(), tmp_path)
    expected = train(later, offload.AdamW(later.parameters()))
    optimizer = offload.AdamW(model.parameters(), step_in_backward=True)
    assert_same(train(model, optimizer, zero=False), expected)


def test_parameters_of_no_optimizer_keep_their_gradients(tmp_path: Path) -> None:
    model = wrap(stack(), tmp_path)
    ours = [p for name, p in model.named_parameters() if not name.endswith("2.weight")]
    offload.AdamW(ours, step_in_backward=True)
    optimizer = offload.AdamW(ours, step_in_backward=True)
    x = torch.randn(4, 256)
    plain = stack()
    plain(x).square().mean().backward()
    model(x).square().mean().backward()
    kept = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        if name.endswith("2.weight"):
            assert torch.equal(param.grad.clone(), kept[name].grad), name
        else:
            assert isinstance(param.grad, SpentGrad), name
    optimizer.step()


def test_a_dropped_optimizer_leaves_gradients_alone(tmp_path: Path) -> None:
    model = wrap(stack(), tmp_path)
    offload.AdamW(model.parameters(), step_in_backward=True)
    x = torch.randn(4, 256)
    plain = stack()
    plain(x).square().mean().backward()
    model(x).square().mean().backward()
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad.clone(), other.grad), name


def test_it_cannot_be_copied() -> None:
    optimizer = offload.AdamW(stack().parameters(), step_in_backward=True)
    with pytest.raises(offload.errors.UnsupportedError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_a_process_group_is_refused(tmp_path: Path) -> None:
    model = stack()
    optimizer = offload.AdamW(model.parameters(), step_in_backward=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(offload.errors.UnsupportedError, match="process group"):
            model(torch.randn(4, 256)).square().mean().backward()
    assert optimizer.state_dict()["state"] == {}
