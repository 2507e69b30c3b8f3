"""``.detach()`` and ``.data`` of a spilled parameter stand for its bytes, wherever they are."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import training as t
from torch import nn

import offload
from offload.tiers.alias import SpilledAlias
from offload.tiers.unit import SpilledParameter

TOKENS = torch.arange(12).view(1, 12)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """A plain model and the same one wrapped, of which most is spilled."""
    torch.manual_seed(0)
    plain = t.Stack()
    return plain, t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack))


def spilled(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Parameter, nn.Parameter]:
    """(plain, wrapped): a matrix that is spilled."""
    for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        if isinstance(b, SpilledParameter) and b.ndim == 2 and b.shape[0] != b.shape[1]:
            return a, b
    raise AssertionError("nothing is spilled")


def test_reading_through_an_alias_gives_the_bytes(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = spilled(pair)
    for plain, ours in ((a.detach(), b.detach()), (a.data, b.data)):
        assert type(ours) is SpilledAlias
        assert ours.shape == plain.shape
        assert ours.stride() == plain.stride()
        assert ours.is_contiguous()
        assert not ours.requires_grad
        assert torch.equal(ours.clone(), plain)
        assert type(ours.clone()) is torch.Tensor
        assert ours.norm().item() == plain.norm().item()
        assert torch.equal(torch.cat([ours, ours * 2]), torch.cat([plain, plain * 2]))
        assert torch.equal(ours.double(), plain.double())
        assert torch.equal(ours.type(torch.float64), plain.double())
        assert ours.type() == plain.type()
        assert ours.tolist() == plain.tolist()
        assert torch.equal(ours.detach().clone(), plain)
        assert "nan" not in repr(ours)


def test_an_array_of_it_is_a_copy_that_cannot_be_written(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    a, b = spilled(pair)
    array = b.detach().numpy()
    assert np.array_equal(array, a.detach().numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1.0


def test_changes_in_place_last(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = spilled(pair)
    values = torch.linspace(-1, 1, a.numel()).view(a.shape)
    for param in (a, b):
        alias = param.data
        assert param.data.mul_(0.5) is not None
        alias.add_(values)
        param.detach().clamp_(-0.3, 0.3)
        torch.add(alias, 1.0, out=alias)
        alias[0, 1] = 7.0
        alias += 1
    assert torch.equal(a.detach(), b.detach().clone())
    with torch.no_grad():
        outputs = [model(TOKENS) for model in pair]
    assert torch.equal(*outputs)


def test_what_is_changed_in_place_is_the_alias_itself(pair: tuple[nn.Module, nn.Module]) -> None:
    alias = spilled(pair)[1].data
    assert alias.mul_(2.0) is alias


def test_an_alias_follows_the_parameter_through_training_and_unwrap(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    a, b = spilled(pair)
    aliases = a.detach(), b.detach()
    makers = (torch.optim.SGD, torch.optim.SGD)
    for model, make in zip(pair, makers, strict=True):
        optimizer = make(model.parameters(), lr=0.1, foreach=False)
        model(TOKENS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(aliases[0], aliases[1].clone())
    offload.unwrap(pair[1])
    assert torch.equal(aliases[0], aliases[1].clone())
    aliases[1].zero_()
    assert not b.any()


def test_a_moving_average_is_exact(pair: tuple[nn.Module, nn.Module]) -> None:
    """As people keep one beside a model."""
    averages = []
    for model in pair:
        average = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            for mean, param in zip(average, model.parameters(), strict=True):
                mean.lerp_(param.data, 0.25)
                mean.mul_(0.9).add_(param.detach(), alpha=0.1)
        averages.append(average)
    assert all(torch.equal(x, y) for x, y in zip(*averages, strict=True))


def test_inside_a_forward_it_is_fetched_with_the_rest(tmp_path: Path) -> None:
    class Reads(t.Stack):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            kept = self.kept
            return super().forward(tokens) + (0 if kept is None else kept.mean())

        kept: torch.Tensor | None = None

    torch.manual_seed(0)
    plain = Reads()
    model = t.wrapped(Reads, tmp_path, t.least_budget(Reads))
    with torch.no_grad():
        for each in (plain, model):
            each.kept = each.get_submodule("blocks.9").mix.weight.detach()
        assert torch.equal(plain(TOKENS), model(TOKENS))


def test_what_would_be_lost_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    alias = spilled(pair)[1].detach()
    for use in (
        lambda: alias.view(-1),
        lambda: alias[0],
        lambda: alias.t(),
        lambda: alias.requires_grad_(),
        lambda: setattr(alias, "requires_grad", True),
        lambda: alias.data_ptr(),
        lambda: torch.from_dlpack(alias),
        lambda: setattr(alias, "data", torch.zeros(3)),
    ):
        with pytest.raises(offload.SpilledTensorError):
            use()


def test_a_copy_of_it_is_an_ordinary_tensor(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = spilled(pair)
    copied = copy.deepcopy(b.detach())
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, a.detach())
