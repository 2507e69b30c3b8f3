"""Plain PyTorch modules train to the same bits wrapped, with released memory poisoned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from torch import nn
from torch.nn.utils import parametrizations
from training import Loop

SMALL = {"io_block_bytes": "64KiB"}


class Logits(nn.Module):
    """Tokens to logits through a body of `width`."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.body = body
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.body(self.embed(tokens))
        logits: torch.Tensor = self.head(y[0] if isinstance(y, tuple) else y)
        return logits


class EncoderDecoder(nn.Module):
    """``nn.Transformer`` with masks; dropout 0.1, so the draws of random numbers must agree too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 96)
        self.transformer = nn.Transformer(96, 4, 2, 2, 384, batch_first=True)
        self.head = nn.Linear(96, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        y = self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True)
        logits: torch.Tensor = self.head(y)
        return logits


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(96, 4, 384, batch_first=True, norm_first=True)
    return Logits(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), 96)


def sequential() -> nn.Module:
    first = nn.Linear(256, 256)  # used twice
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.SiLU()) for _ in range(6)]
    body = [first, nn.Dropout(0.2), *blocks, first, nn.PReLU()]
    return nn.Sequential(nn.Embedding(64, 256), *body, nn.Linear(256, 64))


def older_weight_norm(module: nn.Module) -> nn.Module:
    """The kind that recomputes the weight in a forward pre-hook of its own."""
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(module)


class NormedWeights(nn.Module):
    """Weights computed by weight_norm, spectral_norm and an orthogonal parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 256)
        self.layers = nn.ModuleList(
            [
                parametrizations.weight_norm(nn.Linear(256, 256)),
                parametrizations.spectral_norm(nn.Linear(256, 256)),
                parametrizations.orthogonal(nn.Linear(256, 256)),
                older_weight_norm(nn.Linear(256, 256)),
            ]
        )
        self.head = nn.Linear(256, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits: torch.Tensor = self.head(x)
        return logits


class ConvNet(nn.Module):
    """Convolutions of several kinds, batch and group norm: buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.body = nn.Sequential(
            nn.Conv1d(64, 320, 3, padding=1),
            nn.BatchNorm1d(320),
            nn.ReLU(inplace=True),
            nn.Conv1d(320, 320, 3, padding=1, groups=4),
            nn.GroupNorm(4, 320),
            nn.ConvTranspose1d(320, 64, 3, padding=1),
            nn.BatchNorm1d(64, momentum=None),
        )
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.body(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        logits: torch.Tensor = self.head(y)
        return logits


class Cell(nn.Module):
    """A recurrent cell called once per token: one unit, many uses in a forward."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.cells = nn.ModuleList([kind(64, 128), kind(128, 128)])  # type: ignore[call-arg]
        self.head = nn.Linear(128, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states: list[object] = [None, None]
        outputs = []
        for x in self.embed(tokens).unbind(1):
            for i, cell in enumerate(self.cells):
                states[i] = cell(x, states[i])
                state = states[i]
                x = state[0] if isinstance(state, tuple) else state
            outputs.append(x)
        logits: torch.Tensor = self.head(torch.stack(outputs, 1))
        return logits


class Attention(nn.Module):
    """``MultiheadAttention``, which uses its projection's weight without calling the module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 192)
        self.attend = nn.ModuleList(
            nn.MultiheadAttention(192, 4, batch_first=True) for _ in range(5)
        )
        self.head = nn.Linear(192, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for attend in self.attend:
            x = x + attend(x, x, x, need_weights=False)[0]
        logits: torch.Tensor = self.head(x)
        return logits


class Containers(nn.Module):
    """Parameters in lists and dicts, used by their owner; one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.matrices = nn.ParameterList(torch.randn(128, 128) * 0.05 for _ in range(4))
        self.named = nn.ParameterDict({"in": torch.randn(128), "out": torch.randn(128, 64) * 0.05})
        self.bank = nn.ModuleDict({"a": nn.Linear(128, 128), "b": nn.Bilinear(128, 128, 8)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.named["in"]
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        x = x @ self.matrices[0].t()
        x = self.bank["a"](x) + self.bank["b"](x, x).sum(-1, keepdim=True)
        return x @ self.named["out"]


MODELS: dict[str, t.Model] = {
    "transformer": EncoderDecoder,
    "encoder": encoder,
    "sequential": sequential,
    "parametrizations": NormedWeights,
    "conv": ConvNet,
    "lstm": lambda: Logits(nn.LSTM(128, 128, 2, batch_first=True, dropout=0.1), 128),
    "gru-both-ways": lambda: Logits(nn.GRU(128, 64, 6, batch_first=True, bidirectional=True), 128),
    "lstm-projected": lambda: Logits(nn.LSTM(128, 320, 4, batch_first=True, proj_size=128), 128),
    "lstm-cells": lambda: Cell(nn.LSTMCell),
    "gru-cells": lambda: Cell(nn.GRUCell),
    "attention": Attention,
    "containers": Containers,
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODELS)
def test_training_is_exact(name: str, tmp_path: Path) -> None:
    make, loop = MODELS[name], Loop(steps=3, micro_batches=2)
    budget = t.least_budget(make, **SMALL)
    ours = t.offloaded(make, loop, tmp_path, budget, **SMALL)
    t.assert_same(t.plain(make, loop), ours)
