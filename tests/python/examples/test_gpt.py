from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from gpt import (
    GPT,
    PRESETS,
    GPTConfig,
    learning_rate_factor,
    loss_of,
    measure_micro_batch,
    parameter_groups,
)


@pytest.mark.parametrize(("name", "millions"), [("124m", 121.7), ("350m", 354.3)])
def test_presets_have_the_size_they_say(name: str, millions: float) -> None:
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(PRESETS[name]).parameters())
    assert round(params / 1e6, 1) == millions


def test_a_token_does_not_see_later_ones() -> None:
    torch.manual_seed(0)
    model = GPT(PRESETS["tiny"])
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10:] = torch.randint(256, (2, 6))
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, 256)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def _gradients(config: GPTConfig) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(config)
    loss_of(model, torch.randint(256, (2, 33))).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_checkpointing_changes_no_gradient() -> None:
    plain = _gradients(PRESETS["tiny"])
    recomputed = _gradients(replace(PRESETS["tiny"], checkpoint=True))
    assert len(plain) == len(recomputed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = GPT(replace(PRESETS["tiny"], tied=True)), GPT(PRESETS["tiny"])
    assert tied.head.weight is tied.wte.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


def test_activations_extrapolate_to_what_the_whole_model_keeps() -> None:
    shallow = replace(PRESETS["tiny"], layers=2)
    deep = replace(PRESETS["tiny"], layers=6)
    two, six = (measure_micro_batch(c, 2, 32).activation_bytes for c in (shallow, deep))
    four = measure_micro_batch(replace(deep, layers=4), 2, 32).activation_bytes
    assert six - four == four - two > 0
    # One block keeps 16 floats of its width for a token, and a little for norms and attention.
    per_block = (four - two) / 2
    assert 14 <= per_block / (2 * 32 * 128 * 4) <= 20
    assert measure_micro_batch(replace(deep, checkpoint=True), 2, 32).activation_bytes < six / 2


def test_matrices_decay_and_vectors_do_not() -> None:
    model = GPT(PRESETS["tiny"])
    matrices, vectors = parameter_groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in matrices["params"])
    assert all(p.dim() < 2 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_learning_rate_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(step, warmup=4, steps=20) for step in range(21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[20] == pytest.approx(0.1)
    assert learning_rate_factor(0, warmup=0, steps=1) == 1.0
