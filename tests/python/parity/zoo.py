"""The models: tiny ones of the architectures people train, with a batch for each.

A block has more than 64 KiB of parameters, so that it can be spilled at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

Batch = dict[str, torch.Tensor]

VOCAB = 300
DEPTH = 3
WIDTH = 64


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        model, config: of transformers.
        batch: makes the arguments of a forward.
        options: of the config, beyond the usual ones.
    """

    name: str
    model: type[nn.Module]
    config: Callable[..., Any]
    batch: Callable[[torch.Generator], Batch]
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, **options: Any) -> nn.Module:
        """Return the model in training mode; `options` go to its config."""
        return self.model(self.config(**{**self.options, **options})).train()


def tokens(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=generator)


def causal(generator: torch.Generator) -> Batch:
    ids = tokens((2, 12), generator)
    return {"input_ids": ids, "labels": ids}


def translation(generator: torch.Generator) -> Batch:
    return {"input_ids": tokens((2, 12), generator), "labels": tokens((2, 8), generator)}


def masked(generator: torch.Generator) -> Batch:
    ids = tokens((2, 12), generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def images(generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 10, (2,), generator=generator),
    }


def pairs(generator: torch.Generator) -> Batch:
    return {
        "input_ids": tokens((2, 12), generator),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "return_loss": torch.tensor(True),
    }


def speech(generator: torch.Generator) -> Batch:
    return {
        "input_features": torch.randn(2, 16, 40, generator=generator),
        "labels": tokens((2, 8), generator),
    }


GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 32}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 96}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 16,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
SWITCH = {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SWITCH["num_decoder_layers"] = 2
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 16,
}
ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION = {"image_size": 16, "patch_size": 4, "num_labels": 10}
TOWER = {k: v for k, v in ENCODER.items() if not k.endswith("prob")}
CLIP = {
    "text_config": {**TOWER, "vocab_size": VOCAB, "max_position_embeddings": 16},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
    "projection_dim": 32,
}
MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "state_size": 8,
    "num_hidden_layers": DEPTH,
    "use_mambapy": False,
}

CASES = [
    Case("gpt2", hf.GPT2LMHeadModel, hf.GPT2Config, causal, GPT),
    Case("llama", hf.LlamaForCausalLM, hf.LlamaConfig, causal, DECODER),
    Case("qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, causal, DECODER),
    Case("gemma2", hf.Gemma2ForCausalLM, hf.Gemma2Config, causal, DECODER),
    Case("mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, causal, {**DECODER, **EXPERTS}),
    Case(
        "qwen3-moe", hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, causal, {**DECODER, **QWEN_EXPERTS}
    ),
    Case(
        "switch",
        hf.SwitchTransformersForConditionalGeneration,
        hf.SwitchTransformersConfig,
        translation,
        SWITCH,
    ),
    Case("t5", hf.T5ForConditionalGeneration, hf.T5Config, translation, T5),
    Case("bart", hf.BartForConditionalGeneration, hf.BartConfig, translation, SEQ2SEQ),
    Case("bert", hf.BertForMaskedLM, hf.BertConfig, masked, {**ENCODER, "vocab_size": VOCAB}),
    Case("vit", hf.ViTForImageClassification, hf.ViTConfig, images, {**ENCODER, **VISION}),
    Case("clip", hf.CLIPModel, hf.CLIPConfig, pairs, CLIP),
    Case("whisper", hf.WhisperForConditionalGeneration, hf.WhisperConfig, speech, WHISPER),
    Case("mamba", hf.MambaForCausalLM, hf.MambaConfig, causal, MAMBA),
]
BY_NAME = {case.name: case for case in CASES}
