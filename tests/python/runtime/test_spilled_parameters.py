"""Whatever touches a spilled parameter or gradient gets the right bytes or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.tiers.grad_handle import GradHandle
from offload.tiers.unit import SpilledParameter

BUDGET = 16 << 20


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """The same model, plain and wrapped, after one backward."""
    torch.manual_seed(0)
    reference = t.Stack()
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    tokens = torch.arange(24).view(2, 12)
    for each in (reference, model):
        each(tokens).square().sum().backward()
    return reference, model


def spilled(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Parameter, nn.Parameter]:
    """A spilled matrix and its plain twin."""
    reference, model = pair
    for name, param in model.named_parameters():
        if type(param) is SpilledParameter and param.ndim == 2:
            return reference.get_parameter(name), param
    raise AssertionError("nothing is spilled")


def test_questions_about_a_spilled_parameter_cost_nothing(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    plain, param = spilled(pair)
    before = offload.report(pair[1]).as_dict()["disk_read_bytes"]
    assert param.shape == plain.shape
    assert param.size(0) == plain.size(0)
    assert param.dtype is plain.dtype
    assert param.device == plain.device
    assert param.stride() == plain.stride()
    assert param.is_contiguous()
    assert param.numel() == plain.numel()
    assert param.dim() == 2
    assert param.requires_grad
    assert param.is_leaf
    assert len(param) == len(plain)
    assert isinstance(param, nn.Parameter)
    assert param in {param: 1}
    assert offload.report(pair[1]).as_dict()["disk_read_bytes"] == before


def test_reading_a_spilled_parameter_gives_its_bytes(pair: tuple[nn.Module, nn.Module]) -> None:
    plain, param = spilled(pair)
    assert type(param) is SpilledParameter
    assert torch.equal(param.clone(), plain)
    assert param.sum().item() == plain.sum().item()
    assert torch.equal(param + 1, plain + 1)
    assert torch.equal(torch.cat([param, param]), torch.cat([plain, plain]))
    assert type(param) is SpilledParameter


def test_changing_a_spilled_parameter_in_place_lasts(pair: tuple[nn.Module, nn.Module]) -> None:
    plain, param = spilled(pair)
    with torch.no_grad():
        for each in (plain, param):
            each.mul_(2).add_(1)
        nn.init.constant_(param, 0.5)
        nn.init.constant_(plain, 0.5)
        plain.copy_(torch.arange(plain.numel()).view_as(plain))
        param.copy_(torch.arange(plain.numel()).view(plain.shape))
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(pair[0](tokens), pair[1](tokens))
    assert torch.equal(param.clone(), plain)


def test_memory_of_a_spilled_parameter_is_refused_by_name(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    _, param = spilled(pair)
    name = next(n for n, p in pair[1].named_parameters() if p is param)
    for use in (
        lambda: param.t(),
        lambda: param.detach().view(-1),
        lambda: param[0],
        lambda: param.data_ptr(),
        lambda: param.untyped_storage(),
        lambda: setattr(param, "data", torch.zeros(param.shape)),
    ):
        with pytest.raises(offload.SpilledTensorError, match=name):
            use()


def test_a_penalty_outside_of_forward_is_exact(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    for each in pair:
        each.zero_grad()
        penalty = sum(p.pow(2).sum() for p in each.parameters())
        (each(torch.arange(12).view(1, 12)).sum() + penalty).backward()
    for (name, a), (_, b) in zip(
        reference.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(a.grad, b.grad.clone()), name


def test_a_parameter_changed_between_forward_and_backward_is_noticed(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    optimizer = offload.AdamW(model.parameters())
    tokens = torch.arange(12).view(1, 12)
    model(tokens).sum().backward()
    late = model(tokens).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    optimizer.zero_grad()
    model(tokens).sum().backward()


def test_gradients_answer_as_tensors_do(pair: tuple[nn.Module, nn.Module]) -> None:
    reference, model = pair
    for (name, a), (_, b) in zip(
        reference.named_parameters(), model.named_parameters(), strict=True
    ):
        grad = b.grad
        assert isinstance(grad, GradHandle), name
        assert grad.shape == a.grad.shape
        assert grad.dtype is a.grad.dtype
        assert torch.equal(grad.norm(), a.grad.norm())
        assert torch.equal(torch.linalg.vector_norm(grad, float("inf")), a.grad.abs().max())
        assert torch.equal(grad.clone(), a.grad)
        assert torch.equal(grad + 1, a.grad + 1)
        assert bool(torch.isfinite(grad).all())
        assert name.split(".")[0] in repr(grad)


def test_gradients_change_in_place_as_tensors_do(pair: tuple[nn.Module, nn.Module]) -> None:
    for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        for grad in (a.grad, b.grad):
            grad.mul_(0.3)
            grad.mul_(torch.tensor(1 / 3))
            grad.clamp_(-0.01, 0.01)
            grad.add_(1.0).mul_(7)
            grad.div_(3)
        assert torch.equal(a.grad, b.grad.clone())
        for each in (a, b):
            each.grad[0].zero_()  # through a view
            each.grad.view(-1)[-1] = 5.0
        assert torch.equal(a.grad, b.grad.clone())
    torch.nn.utils.clip_grad_value_(pair[0].parameters(), 0.5)
    torch.nn.utils.clip_grad_value_(pair[1].parameters(), 0.5)
    for foreach in (True, False):
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1, foreach=foreach) for m in pair]
        assert torch.equal(*norms)
    optimizers = [torch.optim.AdamW(pair[0].parameters(), foreach=False)]
    optimizers += [offload.AdamW(pair[1].parameters())]
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad.clone())
        assert torch.equal(a, b.clone())


def test_a_gradient_that_is_gone_says_so(pair: tuple[nn.Module, nn.Module]) -> None:
    _, param = spilled(pair)
    grad = param.grad
    pair[1].zero_grad()
    with pytest.raises(offload.SpilledTensorError, match="no longer exists"):
        grad.clone()


def test_a_gradient_the_user_assigns_is_used(pair: tuple[nn.Module, nn.Module]) -> None:
    optimizers = [
        torch.optim.AdamW(pair[0].parameters(), foreach=False),
        offload.AdamW(pair[1].parameters()),
    ]
    for model, optimizer in zip(pair, optimizers, strict=True):
        for param in model.parameters():
            param.grad = torch.full(param.shape, 0.25)
        model(torch.arange(12).view(1, 12)).sum().backward()  # adds to it
        optimizer.step()
    for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(a, b.clone())


def test_a_gradient_of_a_gradient_is_refused_by_name(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    with pytest.raises(offload.UnsupportedError, match="create_graph"):
        model(torch.arange(12).view(1, 12)).sum().backward(create_graph=True)


def test_torch_optimizers_work_on_a_wrapped_model(tmp_path: Path) -> None:
    loop = t.Loop(steps=3, grads=False)
    results = []
    for model in (t.Stack, lambda: t.wrapped(t.Stack, tmp_path, BUDGET)):
        torch.manual_seed(0)
        made = model()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9, foreach=False)
        results.append(t.train(made, optimizer, loop))
    t.assert_same(*results)


def test_autograd_grad_leaves_gradients_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    tokens = torch.arange(12).view(1, 12)
    found = []
    for model in pair:
        before = [p.grad.clone() for p in model.parameters()]
        loss = model(tokens).sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(
            torch.equal(a, p.grad.clone()) for a, p in zip(before, model.parameters(), strict=True)
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_frozen_parameters_are_never_written(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = t.Stack()
        for block in model.blocks[1:]:
            block.requires_grad_(False)
        return model

    loop = t.Loop(steps=3)
    expected = t.plain(make, loop)
    model = t.wrapped(make, tmp_path, 15 << 20)
    start = offload.report(model).as_dict()["disk_write_bytes"]
    outcome = t.train(model, offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1), loop)
    t.assert_same(expected, outcome)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    written = offload.report(model).as_dict()["disk_write_bytes"] - start
    assert written <= loop.steps * (3 + loop.micro_batches) * (trained + (1 << 20))
