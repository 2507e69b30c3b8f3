"""Models of transformers on two devices: plain training's bits, and operands on one device each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import batches, offload_adamw, seeded, torch_adamw, train
from locations import located, tracked
from torch import nn
from training import assert_same, least_budget
from zoo import BY_NAME, Batch

import offload

pytestmark = pytest.mark.own_device
POLICY: dict[str, Any] = {
    "debug": True,
    "io_block_bytes": "64KiB",
    "max_unit_bytes": "1MiB",
    "calibrate_disk": False,
}
OPTIONS = {"llama": {"tie_word_embeddings": True}}
NAMES = ["gpt2", "llama", "gemma2", "mixtral", "t5", "bart", "bert", "vit", "whisper", "mamba"]


def outside_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Computed by the training loop: the model itself moves labels by ``.to(logits.device)``."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    if "decoder_input_ids" not in given and model.config.is_encoder_decoder:
        given["decoder_input_ids"] = batch["labels"]
    logits = model(**given).logits
    loss: torch.Tensor = nn.functional.cross_entropy(
        logits.flatten(0, -2), batch["labels"].flatten()
    )
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_training_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[name]

    def make() -> nn.Module:
        return case.make(**OPTIONS.get(name, {}))

    data = batches(case, 2)
    expected = train(plain := seeded(make), torch_adamw(plain), data, outside_loss)
    budget = offload.Budget(host=least_budget(make, **POLICY), device="3MiB")
    policy = offload.Policy(budget, device=["simulated:latest"] * 2, swap_dir=tmp_path, **POLICY)
    with located(monkeypatch):
        model = offload.wrap(seeded(make), policy)
    with tracked(model, monkeypatch) as locations:
        found = train(model, offload_adamw(model), data, outside_loss)
    assert_same(expected, found)
    assert locations.moves[0, 1] > 0
    for device in offload.report(model).as_dict()["devices"]:
        assert device["to_device_bytes"] > 0
        assert device["to_host_bytes"] > 0
