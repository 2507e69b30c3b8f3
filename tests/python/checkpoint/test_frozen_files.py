"""load_weights(frozen="file"): frozen weights are read from the checkpoint, and never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from frozen_base import (
    POLICY,
    WIDTH,
    Base,
    adapted,
    after_wrap,
    before_wrap,
    checkpoint,
    in_files,
    policy_for,
    save_file,
    spilled,
    steps,
)

import offload
from offload.runtime.wrapped import wrapped
from offload.tiers.slab import Slab


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("deferred", [True, False])
def test_lora_on_a_base_in_files_is_exact(deferred: bool, shards: int, tmp_path: Path) -> None:
    checkpoint(tmp_path, shards)
    plain = Base()
    offload.load_weights(plain, tmp_path)
    expected = steps(adapted(plain))
    model = before_wrap(tmp_path, deferred)
    assert len(in_files(model)) == 8
    written: list[str] = []
    mover = wrapped(model).context.mover
    write_back = mover.write_back

    def noted(slab: Slab) -> None:
        if slab.dirty:
            written.append(slab.name)
        write_back(slab)

    mover.write_back = noted  # type: ignore[method-assign]
    assert steps(model) == expected
    assert not [name for name in written if "frozen" in name]
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    report = offload.report(model)
    assert report.as_dict()["arena_peak_bytes"] <= report.plan.budget_bytes
    assert any("stay in their files" in note for note in report.notes)
    assert len(in_files(model)) == 8
    offload.unwrap(model)
    assert steps(model, 1) == steps(plain, 1)


def test_nothing_frozen_is_ever_written_to_swap(tmp_path: Path) -> None:
    """Counted by the store, and not even reserved."""
    checkpoint(tmp_path)
    model = before_wrap(tmp_path)
    context = wrapped(model).context
    frozen = sum(p.unit.param_bytes for p in context.plan.placements if p.in_file)
    assert frozen > 4 << 20
    assert context.plan.swap_bytes == sum(context.plan.disk_bytes().values()) - frozen
    assert context.store is not None
    steps(model)
    stats = context.store.stats()
    assert stats["reserved_bytes"] < frozen
    spilled = [
        (p.unit.param_bytes * (not p.pin_params) * (not p.in_file), p.unit.grad_bytes, p)
        for p in context.plan.placements
    ]
    assert all(params == 0 or grads > 0 for params, grads, _ in spilled)
    read = context.files().bytes_read
    assert read > 5 * frozen  # once in wrap, and twice in each step


@pytest.mark.parametrize("shards", [1, 3])
def test_a_wrapped_model_moves_to_the_files(shards: int, tmp_path: Path) -> None:
    state = checkpoint(tmp_path, shards)
    model = after_wrap(tmp_path)
    assert in_files(model) == [f"blocks.{i}" for i in range(7)]
    free = wrapped(model).context.store.stats()["free_bytes"]
    assert free > 7 * (512 << 10)  # what they had of the swap files
    plain = Base()
    plain.load_state_dict(state)
    plain.requires_grad_(False).blocks[7].requires_grad_(True)
    assert steps(model) == steps(plain)
    offload.load_weights(model, tmp_path)  # copies
    assert in_files(model) == []
    offload.load_weights(model, tmp_path, frozen="file")
    assert len(in_files(model)) == 7


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "materialize", "load_weights"])
def test_what_is_written_to_moves_to_swap(how: str, tmp_path: Path) -> None:
    state = checkpoint(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    model = after_wrap(tmp_path)
    plain = Base()
    plain.load_state_dict(state)
    names = ("blocks.1.0.weight", "blocks.1.2.bias")
    with torch.no_grad():
        for name in names:
            plain.get_parameter(name).mul_(2)
    if how == "in place":
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).mul_(2)
    elif how == "load_state_dict":
        model.load_state_dict(plain.state_dict())
    elif how == "materialize":
        with offload.materialize(model.blocks[1]) as block:
            block[0].weight.data.mul_(2)
            block[2].bias.data.mul_(2)
    else:
        other = tmp_path / "other.safetensors"
        save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, other)
        offload.load_weights(model, other)
    assert "blocks.1" not in in_files(model)
    for _ in range(2):  # others pass through the memory meanwhile
        model(torch.zeros(1, WIDTH))
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_what_cannot_stay_is_copied(tmp_path: Path) -> None:
    state = checkpoint(tmp_path)
    state = {k: v.bfloat16() if "blocks.2." in k else v for k, v in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    model = Base().requires_grad_(False)
    weight = model.blocks[3][0].weight
    weight.data = weight.data.t().contiguous().t()
    offload.wrap(model, policy_for(tmp_path))
    offload.load_weights(model, tmp_path, frozen="file")
    assert set(in_files(model)) == spilled(model) - {"blocks.2", "blocks.3"}
    plain = Base()
    plain.load_state_dict(state)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_was_changed_between_loading_and_wrap_is_copied(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    base = Base()
    offload.load_weights(base, tmp_path, frozen="file")
    base.blocks[2][2].weight.data[3, 3] += 1  # which no version counter tells
    expected = {k: v.clone() for k, v in base.state_dict().items()}
    model = offload.wrap(base.requires_grad_(False), policy_for(tmp_path))
    assert set(in_files(model)) == spilled(model) - {"blocks.2"}
    (note,) = [n for n in offload.report(model).notes if "was copied to swap" in n]
    assert note.startswith("blocks.2 was copied to swap: it is not what its file has")
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_narrowed_units_are_copied(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    base = Base().requires_grad_(False)
    base.blocks[7].requires_grad_(True)
    offload.load_weights(base, tmp_path, frozen="file")
    least = t.least_budget(lambda: adapted(Base()), **POLICY)
    policy = offload.Policy(
        offload.Budget(host=least), swap_dir=tmp_path, param_dtype=torch.bfloat16, **POLICY
    )
    model = offload.wrap(base, policy)
    assert in_files(model) == []
    for name, value in Base(seed=7).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
