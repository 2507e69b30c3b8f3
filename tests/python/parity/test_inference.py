"""What a wrapped model gives without training: generated tokens, hidden states, attentions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_spilled, batches, seeded, wrap
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import BY_NAME, Case

GENERATING = ["gpt2", "llama", "qwen3", "gemma2", "mixtral", "switch", "t5", "bart", "mamba"]


@pytest.mark.parametrize("case", [BY_NAME[n] for n in GENERATING], ids=lambda case: case.name)
def test_generated_tokens_are_the_same(case: Case, tmp_path: Path) -> None:
    prompt = batches(case, 1)[0]["input_ids"]
    plain, model = seeded(case.make).eval(), wrap(case.make, tmp_path).eval()

    def tokens(model: Any, **options: Any) -> torch.Tensor:
        torch.manual_seed(3)
        found: torch.Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            min_new_tokens=8,
            pad_token_id=0,
            **options,
        )
        return found

    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 20}, {"use_cache": False}):
        assert torch.equal(tokens(plain, **options), tokens(model, **options)), options
    assert_spilled(model)


@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("gpt2", "t5")], ids=lambda case: case.name)
def test_hidden_states_are_the_same(case: Case, tmp_path: Path) -> None:
    batch = batches(case, 1)[0]
    plain = seeded(lambda: case.make(attn_implementation="eager"))
    model = wrap(lambda: case.make(attn_implementation="eager"), tmp_path)

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(3)  # of dropout
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        return [leaf for leaf in tree_leaves(dict(output)) if isinstance(leaf, torch.Tensor)]

    ours, theirs = outputs(model), outputs(plain)
    assert len(ours) == len(theirs) > 6
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    sum(t.sum() for t in theirs if t.requires_grad).backward()
    sum(t.sum() for t in ours if t.requires_grad).backward()
    for (name, ours_), theirs_ in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours_.grad is None) == (theirs_.grad is None), name
        if theirs_.grad is not None:
            assert torch.equal(ours_.grad.clone(), theirs_.grad), name
    assert_spilled(model)
