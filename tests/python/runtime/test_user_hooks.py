"""Hooks that the user registered, before or after wrap(), run as they do without offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload


def add_hooks(model: nn.Module, seen: list[Any]) -> None:
    """One of each kind; what they saw goes to `seen`."""
    block: Any = model.get_submodule("blocks.2")

    def note(kind: str) -> Any:
        return lambda *args: seen.append((kind, [a.clone() for a in args[1:] if tensor(a)]))

    def tensor(value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def reads_weight(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(("weight", [module.mix.weight.detach().sum()]))
        return output * 1.01

    block.register_forward_pre_hook(lambda module, args: (args[0] * 0.99,))
    block.register_forward_hook(reads_weight)
    block.register_full_backward_pre_hook(
        lambda module, grads: seen.append(("backward-pre", [grads[0].clone()]))
    )
    block.register_full_backward_hook(
        lambda module, inputs, outputs: seen.append(("backward", [inputs[0].clone()]))
    )
    block.out.weight.register_hook(lambda grad: grad * 0.5)
    block.mix.weight.register_post_accumulate_grad_hook(
        lambda param: seen.append(("accumulated", [param.grad.clone()]))
    )
    block.mix.bias.register_hook(note("bias"))


@pytest.mark.parametrize("before", [True, False], ids=["before-wrap", "after-wrap"])
def test_hooks_see_and_change_what_they_would(before: bool, tmp_path: Path) -> None:
    loop = t.Loop(steps=3, micro_batches=2)
    budget = t.least_budget(t.Stack) + (1 << 19)
    plain_seen: list[Any] = []

    def hooked(seen: list[Any]) -> nn.Module:
        model = t.Stack()
        add_hooks(model, seen)
        return model

    theirs = t.plain(lambda: hooked(plain_seen), loop)
    seen: list[Any] = []
    model = t.wrapped((lambda: hooked(seen)) if before else t.Stack, tmp_path, budget)
    if not before:
        add_hooks(model, seen)
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(theirs, t.train(model, optimizer, loop))
    assert [kind for kind, _ in seen] == [kind for kind, _ in plain_seen]
    for (kind, ours), (_, other) in zip(seen, plain_seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True)), kind
    assert offload.report(model).as_dict()["disk_write_bytes"] > 0


class Grown(t.Stack):
    """With a layer that may come later."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        extra = getattr(self, "extra", None)
        return logits if extra is None else logits + extra(logits)


def test_a_layer_added_after_wrap_trains_beside_the_others(tmp_path: Path) -> None:
    def grow(model: nn.Module) -> nn.Module:
        torch.manual_seed(7)
        model.extra = nn.Linear(64, 64)
        return model

    loop = t.Loop(steps=3, micro_batches=2)
    theirs = t.plain(lambda: grow(Grown()), loop)
    model = grow(t.wrapped(Grown, tmp_path, t.least_budget(Grown) + (1 << 19)))
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(theirs, t.train(model, optimizer, loop))
    offload.unwrap(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, theirs.weights[name]), name
