"""A decoder with the shapes and the arithmetic of transformers' Llama, in torch alone.

GPU machines of the benchmark need no transformers. Blocks are checkpointed, as in full fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes; the defaults are those of Llama 7B."""

    vocabulary: int = 32_000
    width: int = 4096
    hidden: int = 11_008
    layers: int = 32
    heads: int = 32

    @property
    def params(self) -> int:
        """Elements of all parameters."""
        block = 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width
        return self.layers * block + 2 * self.vocabulary * self.width + self.width


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of x (batch, sequence, width)."""
        batch, sequence, width = x.shape
        shape = (batch, sequence, self.heads, width // self.heads)
        q, k, v = (
            project(x).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, sequence, width))
        return out


class Block(nn.Module):
    """Attention and a gated MLP, each after a norm and around a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.post_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of x (batch, sequence, width)."""
        x = x + self.attention(self.input_norm(x), cos, sin)
        y = self.post_norm(x)
        out: Tensor = x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


class Llama(nn.Module):
    """Tokens to the loss of the next token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, sequence: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        half = config.width // config.heads // 2
        rates = ROPE_BASE ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(sequence, dtype=torch.float32), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(self.head.weight.dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(self.head.weight.dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of tokens (batch, sequence + 1), a 0-dim tensor."""
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
        logits = self.head(self.norm(x)).flatten(0, 1).float()
        return functional.cross_entropy(logits, tokens[:, 1:].flatten())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
