"""Several threads and a wrapped model: inference beside training, loaders with workers."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import training as t
from torch import nn
from torch.utils.data import DataLoader, Dataset

import offload
from offload.tiers.pointers import Pointers
from offload.tiers.unit import SpilledParameter, SpreadParameter, owner_of


def test_inference_in_other_threads_is_right_while_nothing_trains(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack) + (4 << 20))
    torch.manual_seed(0)
    plain = t.Stack()
    data = [torch.randint(0, 64, (2, n)) for n in range(3, 11)]
    found: dict[int, torch.Tensor] = {}

    def infer(first: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                for i in range(first, len(data), 3):
                    found[i] = model(data[i])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(infer, range(3)))  # raises what a thread raised
    with torch.no_grad():
        for i, tokens in enumerate(data):
            assert torch.equal(found[i], plain(tokens)), i
    report = offload.report(model).as_dict()
    assert report["arena_peak_bytes"] <= report["arena_budget_bytes"]


def test_inference_in_a_second_thread_leaves_training_exact(tmp_path: Path) -> None:
    """The weights that it sees are some step's or the next one's; training does not notice it."""
    loop = t.Loop(steps=4, micro_batches=2)
    theirs = t.plain(t.Stack, loop)
    model = t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack) + (4 << 20))
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    done = threading.Event()

    def infer() -> int:
        passes = 0
        with torch.no_grad():
            while not done.is_set() or not passes:
                logits = model(torch.arange(8).view(1, 8))
                assert torch.isfinite(logits).all()
                passes += 1
        return passes

    with ThreadPoolExecutor(1) as pool:
        inference = pool.submit(infer)
        try:
            ours = t.train(model, optimizer, loop)
        finally:
            done.set()
    assert inference.result() > 0
    t.assert_same(theirs, ours)
    report = offload.report(model).as_dict()
    assert report["arena_peak_bytes"] <= report["arena_budget_bytes"]


def test_no_thread_meets_a_placeholder_that_does_not_say_so(tmp_path: Path) -> None:
    """Between any two lines another thread may read a parameter, which would be NaN to it."""
    model = t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack))
    params = list(model.parameters())
    lines = {Pointers.point.__code__, Pointers.hide.__code__, Pointers.blank.__code__}
    seen: set[type] = set()

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in lines:
            return None
        for param in params:
            owner = owner_of(param)
            assert owner is not None
            seen.add(type(param))
            if type(param) is nn.Parameter:
                assert param.data_ptr() != owner.placeholder.data_ptr()
        return look

    sys.settrace(look)
    try:
        with torch.no_grad():
            model(torch.arange(8).view(1, 8))
    finally:
        sys.settrace(None)
    assert seen - {SpreadParameter} == {nn.Parameter, SpilledParameter}


def test_a_step_takes_nothing_from_under_another_thread(tmp_path: Path) -> None:
    """Its operators see the tensors they were called with; the step is complete all the same."""
    plain = t.Stack()
    model = t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack) + (4 << 20))
    model.load_state_dict(plain.state_dict())
    tokens = torch.arange(8).view(1, 8)
    optimizers = [
        torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False),
        offload.AdamW(model.parameters(), lr=1e-2),
    ]
    for each in (plain, model):
        each(tokens).square().mean().backward()
    inside, stepped = threading.Event(), threading.Event()
    seen: list[tuple[type, int]] = []

    def pause(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        weight = model.blocks[4].mix.weight
        seen.append((type(weight), weight.data_ptr()))
        inside.set()
        assert stepped.wait(10)
        seen.append((type(weight), weight.data_ptr()))

    def infer() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(tokens)
        return logits

    model.blocks[4].mix.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        inference = pool.submit(infer)
        assert inside.wait(60)
        for optimizer in optimizers:
            optimizer.step()
        assert type(model.blocks[4].mix.weight) is nn.Parameter  # not a placeholder meanwhile
        ours = model.blocks[4].mix.weight.detach().clone()
        stepped.set()
        assert torch.isfinite(inference.result()).all()
    assert seen[0] == seen[1]
    assert seen[0][0] is nn.Parameter
    assert torch.equal(ours, plain.blocks[4].mix.weight)
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Tokens(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange(index, index + 10) % 64


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, workers: int) -> list[float]:
    losses = []
    for batch in DataLoader(Tokens(), batch_size=4, num_workers=workers):
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_loader_with_workers_forks_beside_a_wrapped_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = t.Stack()
    model = t.wrapped(t.Stack, tmp_path, t.least_budget(t.Stack) + (1 << 20))
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False)
    ours = offload.AdamW(model.parameters(), lr=1e-2)
    workers = min(2, len(os.sched_getaffinity(0)))  # torch warns of more than there are cores
    for _ in range(2):
        assert epoch(model, ours, workers) == epoch(plain, theirs, workers=0)
