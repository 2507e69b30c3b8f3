"""Models of transformers, made from their configurations; skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import offload

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_layer=3, n_embd=256, n_head=4, vocab_size=1000, n_positions=256
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(num_key_value_heads=2, **SIZES, **more)
    return transformers.LlamaForCausalLM(config)


def tied_half_llama() -> Any:
    return llama(tie_word_embeddings=True).to(torch.bfloat16)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make", [gpt2, llama, tied_half_llama, bert])
def test_a_model_from_its_configuration_is_the_same_and_trains(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    theirs = make()
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    with offload.deferred_init(tmp_path):
        ours = make()
    assert torch.equal(torch.get_rng_state(), expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for found, tensor in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(found, tensor)
    policy = offload.Policy(
        offload.Budget(host="10MiB"), swap_dir=tmp_path, max_unit_bytes=2**20, io_block_bytes=2**16
    )
    offload.wrap(ours, policy)
    tokens = torch.arange(20).view(1, 20)
    outcomes = []
    for model, optimizer in (
        (theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, foreach=False)),
        (ours, offload.optim.SGD(ours.parameters(), lr=0.1)),
    ):
        model.eval()
        losses = []
        for _ in range(2):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.item())
            if model.dtype is torch.float32:
                optimizer.step()
            optimizer.zero_grad()
        outcomes.append(losses)
    assert outcomes[0] == outcomes[1]
