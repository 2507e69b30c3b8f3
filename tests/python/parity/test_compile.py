"""torch.compile of a wrapped model, or of its blocks, against the plain model compiled alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from comparison import (
    Loss,
    assert_spilled,
    batches,
    offload_adamw,
    own_loss,
    seeded,
    torch_adamw,
    train,
    wrap,
)
from torch import nn
from zoo import BY_NAME, Batch

# Compiling, torch itself does what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore")

Compile = Callable[[Any, list[nn.Module]], None]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled_parts(model: nn.Module, whole: bool, backend: str) -> None:
    blocks: Any = model.model.layers if hasattr(model, "model") else model.blocks
    for part in [model] if whole else blocks:
        part.compile(backend=backend)


def break_graphs_alike(plain: nn.Module, wrapped: nn.Module) -> None:
    """Have hooks that are not compiled where the wrapped model has them."""
    nothing = torch.compiler.disable(lambda *args: None)
    for ours, theirs in zip(plain.modules(), wrapped.modules(), strict=True):
        if theirs._forward_pre_hooks:
            ours.register_forward_pre_hook(nothing)
        if theirs._forward_hooks:
            ours.register_forward_hook(nothing, always_call=True)


def assert_same_when_compiled(
    make: t.Model, data: list[Batch], loss_of: Loss, whole: bool, backend: str, swap_dir: Path
) -> None:
    plain, model = seeded(make), wrap(make, swap_dir)
    if whole:
        break_graphs_alike(plain, model)
    compiled_parts(plain, whole, backend)
    expected = train(plain, torch_adamw(plain), data, loss_of)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled_parts(model, whole, backend)
    t.assert_same(expected, train(model, offload_adamw(model), data, loss_of))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert_spilled(model)


def logits_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["input_ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def small_tokens() -> list[Batch]:
    """For the models of training.py, which know 64 tokens."""
    return [{k: v % 64 for k, v in batch.items()} for batch in batches(BY_NAME["gpt2"])]


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_a_compiled_llama_trains_exactly(whole: bool, tmp_path: Path) -> None:
    case = BY_NAME["llama"]

    def make() -> nn.Module:
        return case.make(num_hidden_layers=2)

    assert_same_when_compiled(make, batches(case), own_loss, whole, "aot_eager", tmp_path)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_training_with_inductor_is_exact(whole: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return t.Stack(layers=3, width=128)

    assert_same_when_compiled(make, small_tokens(), logits_loss, whole, "inductor", tmp_path)


def test_a_weight_used_outside_of_its_module_is_right_when_compiled(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return t.UsesOthersWeight(layers=3, width=128)

    plain, model = seeded(make), wrap(make, tmp_path)
    expected = train(plain, torch_adamw(plain), small_tokens(), logits_loss)
    model.compile(backend="aot_eager")
    t.assert_same(expected, train(model, offload_adamw(model), small_tokens(), logits_loss))
    assert_spilled(model)


def test_compiling_what_handles_parameters_outside_of_a_forward_is_refused(tmp_path: Path) -> None:
    model = wrap(lambda: t.Stack(layers=3, width=128), tmp_path)

    @torch.compile(backend="aot_eager")
    def total() -> torch.Tensor:
        return sum(param.sum() for param in model.parameters())

    with pytest.raises(Exception, match="the parameter is spilled") as caught:
        total()
    assert "SpilledTensorError" in str(caught.value)
