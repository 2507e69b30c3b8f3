"""Offloaded training is plain torch training, bit for bit, with released memory poisoned."""

from __future__ import annotations

from pathlib import Path

import pytest
import training as t
from training import Loop

WHOLE_BLOCKS = {"max_unit_bytes": "2MiB"}


@pytest.mark.parametrize(
    "make",
    [
        t.Stack,
        lambda: t.Stack(tied=True),
        t.Checkpointed,
        t.CheckpointedReentrant,
        t.CheckpointedInside,
        t.CheckpointedInsideReentrant,
        t.UsesOthersWeight,
        t.SharedBlock,
        t.Routed,
        t.Recurrent,
        t.Convolutional,
    ],
    ids=[
        "stack",
        "tied",
        "checkpoint",
        "checkpoint-reentrant",
        "checkpoint-inside",
        "checkpoint-inside-reentrant",
        "others-weight",
        "shared-block",
        "routed",
        "lstm",
        "conv",
    ],
)
def test_training_at_the_smallest_budget_is_exact(make: t.Model, tmp_path: Path) -> None:
    small = {"io_block_bytes": "256KiB"}  # with larger ones less memory would hold all of a model
    budget = t.least_budget(make, **small)
    loop = Loop()
    t.assert_same(t.plain(make, loop), t.offloaded(make, loop, tmp_path, budget, **small))


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_training_is_exact_on_either_engine_and_step(
    engine: str, lazy: bool, tmp_path: Path
) -> None:
    loop = Loop(steps=20, micro_batches=2, grads=False)
    ours = t.offloaded(
        t.Stack, loop, tmp_path, 16 << 20, lazy_step=lazy, io_engine=engine, **WHOLE_BLOCKS
    )
    t.assert_same(t.plain(t.Stack, loop), ours)


@pytest.mark.parametrize(
    "loop",
    [
        Loop(micro_batches=1),
        Loop(micro_batches=1, clip=None),
        Loop(set_to_none=False),
        Loop(eval_every=2),
        Loop(clip=None, micro_batches=2, set_to_none=False),
        Loop(clip=1e9),
    ],
    ids=["one", "no-clip", "zero-fill", "eval", "zero-fill-no-clip", "clip-inactive"],
)
def test_training_is_exact_in_every_kind_of_loop(loop: Loop, tmp_path: Path) -> None:
    ours = t.offloaded(t.Stack, loop, tmp_path, t.least_budget(t.Stack) + (1 << 18))
    t.assert_same(t.plain(t.Stack, loop), ours)


@pytest.mark.parametrize("budget", [16 << 20, 20 << 20, 32 << 20, 40 << 20])
def test_training_is_exact_at_every_budget(budget: int, tmp_path: Path) -> None:
    """From almost nothing in memory to all but some optimizer state."""
    loop = Loop()
    t.assert_same(t.plain(t.Stack, loop), t.offloaded(t.Stack, loop, tmp_path, budget))


@pytest.mark.cpu_updates
def test_a_model_of_24_blocks_trains_within_three_of_them(tmp_path: Path) -> None:
    """Parameters and gradients of three blocks, in which staging and everything else must fit."""

    def make() -> t.Stack:
        return t.Stack(layers=24)

    model = make()
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    assert sum(p.nbytes for p in model.parameters()) > 20 * block
    loop = Loop(steps=3)
    ours = t.offloaded(make, loop, tmp_path, 3 * 2 * block, io_block_bytes="64KiB", **WHOLE_BLOCKS)
    t.assert_same(t.plain(make, loop), ours)


def test_units_named_by_hand_are_exact(tmp_path: Path) -> None:
    loop = Loop()
    ours = t.offloaded(
        t.Stack, loop, tmp_path, 16 << 20, units=["blocks.0", "blocks.1", "blocks.2", "embed"]
    )
    t.assert_same(t.plain(t.Stack, loop), ours)


def test_training_is_exact_where_torch_does_not_tell_the_active_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.6 and 2.7 do not."""
    monkeypatch.setattr("offload.runtime.saved_tensors.active_hooks", lambda: None)
    for make in (t.Stack, t.Checkpointed):
        loop = Loop(steps=2)
        t.assert_same(t.plain(make, loop), t.offloaded(make, loop, tmp_path, 16 << 20))


def test_a_recomputation_that_cannot_be_counted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch, where it does not tell the active hooks."""
    monkeypatch.setattr("offload.runtime.saved_tensors.active_hooks", lambda: None)
    model = t.wrapped(t.CheckpointedInside, tmp_path, 16 << 20, **WHOLE_BLOCKS)
    with pytest.raises(t.torch.utils.checkpoint.CheckpointError):
        model(t.torch.arange(24).view(2, 12)).sum().backward()
    loop = Loop(steps=2)
    make = t.CheckpointedInsideReentrant
    ours = t.offloaded(make, loop, tmp_path, 16 << 20, **WHOLE_BLOCKS)
    t.assert_same(t.plain(make, loop), ours)


def test_checkpointing_keeps_no_activations(tmp_path: Path) -> None:
    kept = {}
    for make in (t.Stack, t.Checkpointed):
        model = t.wrapped(make, tmp_path, 16 << 20)
        saved: list[int] = []

        def pack(tensor: t.torch.Tensor, saved: list[int] = saved) -> t.torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor.detach()

        with t.torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(t.torch.arange(24).view(2, 12))
        kept[make] = sum(saved)
    assert kept[t.Checkpointed] < kept[t.Stack] / 3


def test_without_a_swap_directory_everything_stays_in_memory() -> None:
    loop = Loop()
    policy = t.offload.Policy(budget=t.offload.Budget(host="64MiB"), debug=True)
    t.torch.manual_seed(0)
    model = t.offload.wrap(t.Stack(), policy)
    optimizer = t.offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(t.plain(t.Stack, loop), t.train(model, optimizer, loop))
    assert t.offload.report(model).as_dict()["disk_write_bytes"] == 0
