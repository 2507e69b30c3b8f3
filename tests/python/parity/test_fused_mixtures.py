"""Mixtures of transformers that keep all experts of a layer in one parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fused as f
import pytest
import torch
from fused import Reads
from torch import nn

import offload
from offload.tiers.blocks import SlabBlocks
from offload.tiers.context import RuntimeContext

hf = pytest.importorskip("transformers", minversion="5")

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.own_device]
poisoned = f.poisoned

EXPERTS = 8
COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
"""Each expert is 384 KiB: whole blocks of the store."""


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(**COMMON, intermediate_size=256, num_local_experts=EXPERTS)
    return hf.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **COMMON,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_experts=EXPERTS,
        norm_topk_prob=True,
    )
    return hf.Qwen3MoeForCausalLM(config)


MODELS = pytest.mark.parametrize("make", [mixtral, qwen3_moe])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])


class Pair:
    """A plain model, which notes where its tokens go, and the same one wrapped."""

    def __init__(self, make: Callable[[], Any], implementation: str, swap_dir: Path) -> None:
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = make().eval()
            model.set_experts_implementation(implementation)
            models.append(model)
        self.plain, self.model = models
        self.hits: dict[str, set[int]] = {}
        for name, module in self.plain.named_modules():
            if hasattr(module, "gate_up_proj"):
                module.register_forward_pre_hook(self.noting(name))
        self.context: RuntimeContext = f.wrap(self.model, swap_dir)
        assert len(f.by_row(self.context)) == 3

    def noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.hits.setdefault(name, set()).update(args[1].flatten().tolist())

        return note

    def assert_hits_were_read(self, reads: Reads) -> None:
        """The blocks of the experts that had tokens since the last call, and no others."""
        assert all(len(hits) < EXPERTS for hits in self.hits.values()), self.hits
        for unit in f.by_row(self.context):
            blocks = SlabBlocks.of_size(unit.param_bytes, f.BLOCK)
            wanted = set(blocks.missing(unit.ranges(frozenset(self.hits[unit.name]))))
            assert len(wanted) * EXPERTS == len(self.hits[unit.name]) * 48
            assert reads.blocks.get(unit.param_slab.name, set()) == wanted, unit.name
        self.hits.clear()
        reads.blocks.clear()


@MODELS
@IMPLEMENTATIONS
def test_inference_reads_the_experts_that_it_uses(
    make: Callable[[], Any], implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(make, implementation, tmp_path)
    f.give_up(pair.context)
    reads = Reads(pair.context, monkeypatch)
    for first in range(0, 12, 3):
        tokens = torch.arange(first, first + 2)[None]
        with torch.no_grad():
            assert torch.equal(pair.model(tokens).logits, pair.plain(tokens).logits)
        pair.assert_hits_were_read(reads)
        f.give_up(pair.context)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(tokens)
    ours, theirs = (m.generate(tokens, **options) for m in (pair.model, pair.plain))
    assert torch.equal(ours, theirs)
    pair.assert_hits_were_read(reads)


@MODELS
@IMPLEMENTATIONS
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_forward_and_backward_read_the_experts_that_they_use(
    make: Callable[[], Any],
    implementation: str,
    rule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair(make, implementation, tmp_path)
    theirs = getattr(torch.optim, rule)(pair.plain.parameters(), lr=1e-2, foreach=False)
    ours = getattr(offload.optim, rule)(pair.model.parameters(), lr=1e-2)
    reads = Reads(pair.context, monkeypatch)
    for step in range(3):
        with pair.context.lock:
            pair.context.flush()  # an update changes all of them
        f.give_up(pair.context)
        tokens = torch.arange(2 * step, 2 * step + 2)[None]
        losses = [m(tokens, labels=tokens).loss for m in (pair.plain, pair.model)]
        assert losses[0].item() == losses[1].item()
        if step == 0:
            pair.assert_hits_were_read(reads)
        f.give_up(pair.context)
        for loss in losses:
            loss.backward()
        for (name, mine), other in zip(
            pair.model.named_parameters(), pair.plain.parameters(), strict=True
        ):
            assert torch.equal(mine.grad.clone(), other.grad), name
        if step:  # in both together; what is gathered by an index is saved as a copy
            pair.assert_hits_were_read(reads)
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
        reads.blocks.clear()
        pair.hits.clear()
    for (name, mine), other in zip(
        pair.model.named_parameters(), pair.plain.parameters(), strict=True
    ):
        assert torch.equal(mine.clone(), other), name
