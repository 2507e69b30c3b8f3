"""A GPT-2-style decoder in plain PyTorch. Nothing in this file knows about offload."""

from __future__ import annotations

import ctypes
import hashlib
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. `width` must be a multiple of `heads`."""

    layers: int
    width: int
    heads: int
    context: int = 1024
    vocabulary: int = 256
    tied: bool = False
    """The head shares its weight with the token embedding."""
    checkpoint: bool = False
    """Keep only each block's input and compute the block again in backward."""


PRESETS = {
    "tiny": GPTConfig(layers=12, width=128, heads=4, context=128),
    # GPT-2 small has 12 layers and a vocabulary of 50257, whose embedding is 38M of its 124M
    # parameters. Bytes need 256 rows; five more blocks of 7.1M make up for the rest: 121.7M.
    "124m": GPTConfig(layers=17, width=768, heads=12),
    # As GPT-2 medium's 24 layers, with four more in place of its 51M embedding: 354.3M.
    "350m": GPTConfig(layers=28, width=1024, heads=16),
}


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.ln_1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.ln_2 = nn.LayerNorm(config.width)
        self.fc = nn.Linear(config.width, 4 * config.width)
        self.out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) to the same shape."""
        batch, sequence, width = x.shape
        qkv: Tensor = self.qkv(self.ln_1(x)).view(
            batch, sequence, 3, self.heads, width // self.heads
        )
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, sequence, width))
        update: Tensor = self.out(nn.functional.gelu(self.fc(self.ln_2(x)), approximate="tanh"))
        return x + update


class GPT(nn.Module):
    """Byte tokens in, logits out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight
        self._initialize()

    def _initialize(self) -> None:
        """GPT-2's: normal(0.02), smaller where a layer writes to the residual stream."""
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual if name.endswith((".proj", ".out")) else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 (batch, sequence ≤ context). Returns (batch, sequence, vocabulary)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            if self.config.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        return logits


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy of the next byte. windows: int64 (batch, sequence + 1)."""
    logits: Tensor = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms and biases."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth. step counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over all parameters in the order of their modules, one module in memory at a time."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        for key, value in module.state_dict().items():
            weight = value.detach().contiguous()
            digest.update(f"{name}.{key} {tuple(weight.shape)}\n".encode())
            content = (ctypes.c_char * weight.nbytes).from_address(weight.data_ptr())
            digest.update(content)
    return digest.hexdigest()


@dataclass(frozen=True)
class MicroBatchCost:
    """What one micro-batch costs, from running two small models of the same width."""

    activation_bytes: int
    """Kept for backward at the end of the forward pass, parameters not included."""
    working_bytes: int
    """Gradients of one block's parameters and activations, alive at once during backward."""
    seconds: float
    """Forward and backward of the whole model."""


def measure_micro_batch(config: GPTConfig, batch: int, sequence: int) -> MicroBatchCost:
    """Runs one and two layers of `config` on random windows and extrapolates to all its layers.

    It also makes the libraries set up what they keep for good (thread pools, packing buffers, the
    modules an optimizer imports on first use), so memory measured afterwards includes it.
    Draws from torch's global generator: seed after, not before.
    """
    kept: list[int] = []
    seconds: list[float] = []
    block_bytes = 0
    for layers in (1, 2):
        probe = replace(config, layers=layers, checkpoint=False)
        model = GPT(probe)
        block_bytes = sum(p.nbytes for p in model.blocks[0].parameters())
        windows = torch.randint(config.vocabulary, (batch, sequence + 1))
        kept.append(_bytes_saved_for_backward(model, windows))
        started = time.perf_counter()
        loss_of(model, windows).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - started)
        parameters = list(model.ln_f.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer = torch.optim.AdamW(parameters, foreach=False)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    per_block, per_block_seconds = kept[1] - kept[0], max(0.0, seconds[1] - seconds[0])
    outside = kept[0] - per_block
    residual = batch * sequence * config.width * 4
    if config.checkpoint:
        activations = outside + per_block + config.layers * residual
        per_block_seconds *= 4 / 3
    else:
        activations = outside + config.layers * per_block
    return MicroBatchCost(
        activation_bytes=activations,
        working_bytes=block_bytes + 3 * 4 * residual,
        seconds=max(0.0, seconds[0] - per_block_seconds) + config.layers * per_block_seconds,
    )


def _bytes_saved_for_backward(model: nn.Module, windows: Tensor) -> int:
    """Bytes of the distinct storages autograd keeps, parameters not counted; runs backward too."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, windows)
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(storages.values())
