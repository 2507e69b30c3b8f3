"""wrap() and unwrap(): what they keep, what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.tiers.unit import SpilledParameter

BUDGET = 16 << 20


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_wrap_keeps_object_class_names_parameters_and_values(tmp_path: Path) -> None:
    model = t.Stack()
    before, params = values(model), dict(model.named_parameters())
    assert (
        t.offload.wrap(model, offload.Policy(budget=offload.Budget(host=BUDGET), swap_dir=tmp_path))
        is model
    )
    assert type(model) is t.Stack
    after = dict(model.named_parameters())
    assert list(after) == list(params)
    assert all(after[n] is params[n] for n in params)
    assert_equal(before, values(model))


def test_unwrap_gives_back_ordinary_tensors_and_gradients(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens).sum().backward()
    before = values(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    offload.unwrap(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert_equal(before, values(model))
    for name, param in model.named_parameters():
        assert type(param.grad) is torch.Tensor
        assert torch.equal(param.grad, grads[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(tokens).sum().backward()
    copy.deepcopy(model)


def test_tied_weights_are_one_tensor_in_a_state_dict(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return t.UsesOthersWeight(layers=6, width=512, tied=True)

    model = t.wrapped(make, tmp_path, t.least_budget(make))
    assert type(model.embed.weight) is SpilledParameter
    first = model.state_dict()
    assert first["head.weight"].data_ptr() == first["embed.weight"].data_ptr()
    with torch.no_grad():
        model.embed.weight.add_(1)
    second = model.state_dict()
    assert second["head.weight"].data_ptr() == second["embed.weight"].data_ptr()
    assert torch.equal(second["head.weight"], first["head.weight"] + 1)
    assert torch.equal(model.head.state_dict()["weight"], second["head.weight"])
    assert_equal(model.state_dict(), second)


def test_a_model_can_be_wrapped_again_after_unwrap(tmp_path: Path) -> None:
    model = offload.unwrap(t.wrapped(t.Stack, tmp_path, BUDGET))
    before = values(model)
    offload.wrap(model, offload.Policy(budget=offload.Budget(host=BUDGET), swap_dir=tmp_path))
    assert_equal(before, values(model))


def test_wrapping_twice_is_refused(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    with pytest.raises(offload.PolicyError, match="wrapped already"):
        offload.wrap(model, offload.Policy(budget=offload.Budget(host=BUDGET)))


def test_a_budget_that_cannot_do_is_refused_with_the_smallest_that_would(tmp_path: Path) -> None:
    model = t.Stack()
    before = values(model)
    least = t.least_budget(t.Stack)

    def policy(host: int) -> offload.Policy:
        return offload.Policy(offload.Budget(host=host), swap_dir=tmp_path, **t.SMALL_BLOCKS)

    for nbytes in (4096, least - 4096):
        with pytest.raises(offload.BudgetError, match=f"is {least} bytes"):
            offload.wrap(model, policy(nbytes))
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert_equal(before, values(model))
    offload.wrap(model, policy(least))


def test_without_swap_a_small_budget_is_refused() -> None:
    with pytest.raises(offload.BudgetError, match="without a swap directory"):
        offload.wrap(t.Stack(), offload.Policy(budget=offload.Budget(host=BUDGET)))


def test_a_disk_budget_is_a_limit_too(tmp_path: Path) -> None:
    policy = offload.Policy(budget=offload.Budget(host=BUDGET, disk="20MiB"), swap_dir=tmp_path)
    with pytest.raises(offload.SwapSpaceError, match=r"Budget\(disk=20971520\) is too small"):
        offload.wrap(t.Stack(), policy)


@pytest.mark.parametrize(
    ("units", "message"),
    [(["nothing"], "no module 'nothing'"), (["blocks", "blocks.0"], "contains")],
)
def test_unit_names_that_make_no_sense_are_refused(
    units: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(offload.PolicyError, match=message):
        t.wrapped(t.Stack, tmp_path, BUDGET, units=units)


def test_parameters_that_cannot_move_are_refused(tmp_path: Path) -> None:
    policy = offload.Policy(budget=offload.Budget(host=BUDGET), swap_dir=tmp_path)
    with pytest.raises(offload.UnsupportedError, match=r"weight is a .* on meta"):
        offload.wrap(nn.Linear(4, 4, device="meta"), policy)
    with pytest.raises(offload.UnsupportedError, match="UninitializedParameter"):
        offload.wrap(nn.LazyLinear(4), policy)
    with pytest.raises(offload.UnsupportedError, match="no parameters"):
        offload.wrap(nn.ReLU(), policy)


def test_copies_and_conversions_are_refused_by_name(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    before = values(model)
    with pytest.raises(offload.UnsupportedError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(offload.UnsupportedError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(offload.UnsupportedError, match="cannot be copied"):
        copy.deepcopy(model.blocks)
    with pytest.raises(offload.UnsupportedError, match="cannot be moved or converted"):
        model.half()
    assert model.to("cpu") is model
    assert model.float() is model
    assert_equal(before, values(model))


def test_report_names_what_lives_where(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    report = offload.report(model)
    size = sum(p.numel() for p in model.parameters()) * 4
    rows = {row["what"]: row for row in report.plan_table()}
    for what, expected in (
        ("parameters", size),
        ("gradients", size),
        ("optimizer state", 2 * size),
    ):
        total = rows[what]["host_bytes"] + rows[what]["disk_bytes"]
        assert expected <= total <= expected * 1.02
    assert sum(row["host_bytes"] for row in rows.values()) <= BUDGET
    assert "optimizer state" in str(report)
    assert "I/O engine" in str(report)
    with pytest.raises(offload.OffloadError, match="not wrapped"):
        offload.report(nn.Linear(2, 2))


def test_state_dict_and_load_state_dict_hold_current_values(tmp_path: Path) -> None:
    loop = t.Loop(steps=2, micro_batches=1)
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    assert any(type(p) is SpilledParameter for p in model.parameters())
    t.train(model, offload.AdamW(model.parameters()), loop)
    saved = model.state_dict()
    other = t.Stack()
    other.load_state_dict(saved)
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(model(tokens), other(tokens))
    fresh = t.Stack()
    model.load_state_dict(fresh.state_dict())
    assert_equal(values(fresh), values(model))
    assert torch.equal(model(tokens), fresh(tokens))
    with pytest.raises(offload.UnsupportedError, match="assign"):
        model.load_state_dict(fresh.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(t.Stack(width=128).state_dict())
    assert_equal(values(fresh), values(model))


def test_state_dict_round_trips_through_torch_save(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    size = sum(p.numel() for p in model.parameters()) * 4
    assert path.stat().st_size < 1.1 * size
    assert_equal(torch.load(path), values(model))
