"""The budget is a limit at every moment, and memory does not creep."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import training as t

import offload


def rss() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def test_arena_returns_to_the_pinned_bytes_between_steps(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, 16 << 20)
    optimizer = offload.AdamW(t.groups(model))
    loop = t.Loop(steps=3, grads=False)
    t.train(model, optimizer, loop)
    context = model._offload_wrapped.context
    context.flush()
    home = context.mover.home.usage()
    assert home["in_use"] == home["peak"] <= context.plan.pinned_bytes
    assert context.mover.ring.usage()["peak"] <= context.plan.ring_bytes


def test_rss_stays_flat_over_200_steps(tmp_path: Path) -> None:
    model = t.wrapped(lambda: t.Stack(layers=4), tmp_path, 15 << 20)
    optimizer = offload.AdamW(t.groups(model))
    loop = t.Loop(steps=20, micro_batches=1, grads=False)
    t.train(model, optimizer, loop)
    gc.collect()
    before = rss()
    for _ in range(9):
        t.train(model, optimizer, loop)
    gc.collect()
    assert rss() - before < 3 << 20


def test_a_dropped_model_gives_everything_back(tmp_path: Path) -> None:
    def once() -> None:
        model = t.wrapped(t.Stack, tmp_path, 16 << 20)
        t.train(model, offload.AdamW(t.groups(model)), t.Loop(steps=1, micro_batches=1))

    once()
    gc.collect()
    before, files = rss(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(4):
        once()
        gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert rss() - before < 24 << 20


def test_a_parameter_outlives_its_model_with_a_clear_error(tmp_path: Path) -> None:
    params = list(t.wrapped(t.Stack, tmp_path, 16 << 20).parameters())
    gc.collect()
    spilled = next(p for p in params if type(p) is not torch.nn.Parameter)
    with pytest.raises(offload.SpilledTensorError, match="was dropped"):
        spilled.sum()


def test_two_wrapped_models_share_a_directory(tmp_path: Path) -> None:
    loop = t.Loop(steps=2)
    expected = t.plain(t.Stack, loop)
    models = [t.wrapped(t.Stack, tmp_path, 16 << 20) for _ in range(2)]
    for model in models:
        optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
        t.assert_same(expected, t.train(model, optimizer, loop))
    offload.unwrap(models[0])
    assert torch.equal(models[0].head.weight, models[1].state_dict()["head.weight"])
