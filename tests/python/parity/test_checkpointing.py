"""Gradient checkpointing of transformers: their layers recompute inside of their own hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison import assert_parity, batches
from torch import nn
from zoo import BY_NAME, Case

CHECKPOINTED = [
    "gpt2",
    "llama",
    "gemma2",
    "mixtral",
    "switch",
    "t5",
    "bert",
    "vit",
    "clip",
    "whisper",
    "mamba",
]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("case", [BY_NAME[n] for n in CHECKPOINTED], ids=lambda case: case.name)
def test_checkpointed_training_is_exact(case: Case, reentrant: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = case.make()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    assert_parity(make, batches(case), tmp_path)
