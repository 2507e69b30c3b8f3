"""What tests do with --device cuda: on the CPU it changes nothing but where things are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from computing_on import compute_on
from torch import nn

CPU = torch.device("cpu")


def test_training_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = t.Loop(steps=2, micro_batches=1)
    expected = t.plain(t.Stack, loop)
    handle = compute_on(CPU, monkeypatch)
    try:
        t.assert_same(expected, t.plain(t.Stack, loop))
        t.assert_same(expected, t.offloaded(t.Stack, loop, tmp_path, t.least_budget(t.Stack)))
    finally:
        handle.remove()


def test_calls_move_models_and_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []

    class Module(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.weight.device, x.device))
            return torch.ones(2)

    handle = compute_on(torch.device("meta"), monkeypatch)
    try:
        model = nn.Sequential(Module(2, 2))
        with pytest.raises(NotImplementedError, match="meta"):
            nn.Linear(2, 2)(torch.ones(2))  # its result is there
        assert model(torch.ones(2)).device == CPU
    finally:
        handle.remove()
    assert [(a.type, b.type) for a, b in seen] == [("meta", "meta")]


def test_steps_move_parameters_and_gradients_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = compute_on(CPU, monkeypatch)
    try:
        param = nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        torch.optim.SGD([param], lr=1.0).step()
    finally:
        handle.remove()
    assert torch.equal(param, torch.zeros(2))
    assert param.grad is not None
