"""unwrap() gives back the model that wrap() was given, and nothing more or less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload

BUDGET = 8 << 20


def mixed() -> nn.Sequential:
    """Layers with hooks, frozen parameters, strides of their own."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256)) for _ in range(6)])
    model[2][0].weight.requires_grad_(False)
    model[3][0].weight.data = model[3][0].weight.data.t()
    model.register_buffer("table", torch.rand(300, 300))
    return model


def policy(folder: Path) -> offload.Policy:
    return offload.Policy(
        offload.Budget(host=3 << 20), swap_dir=folder, max_unit_bytes="1MiB", io_block_bytes=2**16
    )


def description(model: nn.Module) -> dict[str, Any]:
    """All that a model holds, apart from values."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = type(module)
        for key, value in module.__dict__.items():
            found[f"{name}:{key}"] = list(value) if hasattr(value, "__len__") else value
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (
            *(type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad),
            *(tensor._is_view(), tensor.is_leaf, tensor.storage_offset()),
            tensor.untyped_storage().nbytes(),
            sorted(tensor.__dict__),
            list(tensor._backward_hooks or ()),
            list(tensor._post_accumulate_grad_hooks or ()),
            tensor._post_accumulate_grad_hooks is None,
        )
    return found


def test_nothing_is_left_on_modules_and_parameters(tmp_path: Path) -> None:
    model = mixed()
    calls = []
    model[0][0].register_forward_hook(lambda *_: calls.append("forward"))
    model[1][0].weight.register_hook(lambda grad: calls.append("grad"))
    model[4][0].bias.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    before, parameters = description(model), list(model.parameters())
    offload.wrap(model, policy(tmp_path))
    optimizer = offload.AdamW(model.parameters())
    for _ in range(2):
        model(torch.rand(2, 256)).sum().backward()
        optimizer.step()
    offload.unwrap(model)
    assert description(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert sorted(calls) == ["accumulated"] * 2 + ["forward"] * 2 + ["grad"] * 2
    for param in parameters:
        assert (param.grad is not None) == param.requires_grad
        assert type(param.grad) in (torch.Tensor, type(None))


@pytest.mark.own_device
def test_a_gradient_from_before_wrap_survives(tmp_path: Path) -> None:
    model = mixed()
    x = torch.rand(2, 256)
    model(x).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: g.clone() for n, g in grads.items() if g is not None}
    offload.unwrap(offload.wrap(model, policy(tmp_path)))
    for name, param in model.named_parameters():
        assert param.grad is grads[name]
        assert param.grad is None or torch.equal(param.grad, copies[name])
    offload.wrap(model, policy(tmp_path))
    model(x).sum().backward()  # is accumulated
    offload.unwrap(model)
    for name, param in model.named_parameters():
        assert param.grad is None or torch.equal(param.grad, copies[name] + copies[name])


def test_a_gradient_that_became_an_ordinary_tensor_survives(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, 16 << 20)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    weight = model.blocks[3].mix.weight
    view = weight.grad.view(-1)
    view[0] = 7.0
    expected = view.clone()
    offload.unwrap(model)
    assert torch.equal(weight.grad.view(-1), expected)


def test_a_failed_wrap_keeps_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.tiers.prefetcher import Prefetcher

    model = mixed()
    model(torch.rand(2, 256)).sum().backward()
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters()}

    def fail(prefetcher: Prefetcher) -> None:
        raise offload.SwapIOError(5, "the disk is gone")

    monkeypatch.setattr(Prefetcher, "measure_disk", fail)
    described = description(model)
    with pytest.raises(offload.SwapIOError):
        offload.wrap(model, policy(tmp_path))
    assert description(model) == described
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name][0])
        assert param.grad is before[name][1]


def test_parameters_that_share_memory_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    with pytest.raises(offload.UnsupportedError, match=r"0\.weight and 1\.weight .* same memory"):
        offload.wrap(model, policy(tmp_path))
    model[1].weight = nn.Parameter(torch.rand(64, 64))
    model.register_buffer("first_row", model[0].weight.data[0])
    with pytest.raises(offload.UnsupportedError, match="first_row"):
        offload.wrap(model, policy(tmp_path))


def test_parameters_that_lie_side_by_side_in_one_storage_are_not(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    flat = torch.rand(2, 64, 64)
    for layer, part in zip(model, flat, strict=True):
        layer.weight.data = part
    expected = model(torch.ones(1, 64))
    offload.wrap(model, offload.Policy(offload.Budget(host="8MiB")))
    assert torch.equal(model(torch.ones(1, 64)), expected)
    offload.unwrap(model)
    assert all(torch.equal(layer.weight, part) for layer, part in zip(model, flat, strict=True))
