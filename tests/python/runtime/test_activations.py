"""Training with its activations moved or recomputed is plain torch training, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training as t
from torch import nn
from training import Loop

import offload

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import gpt

MIB = 1 << 20
MODES = ["keep", "host", "disk", "recompute", "auto"]


class Dropping(t.Stack):
    """Dropout in every block, as a module, and as a function in the root."""

    def __init__(self) -> None:
        super().__init__(layers=4, width=128)
        for i, block in enumerate(self.blocks):
            self.blocks[i] = nn.Sequential(block, nn.Dropout(0.3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.embed(tokens), 0.1, self.training)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Images(nn.Module):
    """Convolutions and batch norm, whose buffers every forward in training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(inplace=True),
                nn.Dropout2d(0.1),
            )
            for _ in range(3)
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).view(len(tokens), 1, -1, 64).repeat(1, 16, 1, 1)
        for stage in self.stages:
            x = x + stage(x)
        logits: torch.Tensor = self.head(x.mean(1) + self.pool(x).mean((1, 2, 3))[:, None, None])
        return logits


class Lstm(t.Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64))


class Gpt(gpt.GPT):
    checkpoint = False

    def __init__(self) -> None:
        super().__init__(
            gpt.GPTConfig(
                layers=4, width=128, heads=4, context=256, tied=True, checkpoint=self.checkpoint
            )
        )


class CheckpointedGpt(Gpt):
    checkpoint = True


class ReentrantGpt(Gpt):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(tokens)
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        logits: torch.Tensor = self.head(self.ln_f(x))
        return logits


class Bf16Gpt(Gpt):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(tokens)


MODELS: dict[str, t.Model] = {
    "gpt": Gpt,
    "gpt-checkpoint": CheckpointedGpt,
    "gpt-reentrant": ReentrantGpt,
    "gpt-bf16": Bf16Gpt,
    "dropout": Dropping,
    "images": Images,
    "lstm": Lstm,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> t.Outcome:
    """Steps of two micro-batches, with sequences of several lengths."""
    outcome = t.Outcome()
    data = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # of dropout
    for step in range(steps):
        for length in (192, 128 + 32 * step):
            tokens = torch.randint(0, 64, (4, length + 1), generator=data)
            logits = model(tokens[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            outcome.losses.append(loss.item())
        outcome.grads.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        )
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            outcome.losses.append(model(tokens[:, :-1]).sum().item())
        model.train()
    outcome.weights = {k: v.clone() for k, v in model.state_dict().items()}
    return outcome


def plain(make: t.Model) -> t.Outcome:
    torch.manual_seed(0)
    model = make()
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False))


def moved(make: t.Model, folder: Path, mode: str, **policy: object) -> tuple[nn.Module, t.Outcome]:
    torch.manual_seed(0)
    kind = {"budget": offload.Budget(host="64MiB"), "swap_dir": folder, "debug": True}
    kind |= {} if mode == "keep" else {"activation_bytes": "5MiB"}
    model = offload.wrap(make(), offload.Policy(**{**kind, **policy}, activations=mode))
    return model, train(model, offload.AdamW(model.parameters(), lr=1e-3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_exact(name: str, mode: str, tmp_path: Path) -> None:
    # The workspace of one LSTM is 6 MB.
    room = {"activation_bytes": "16MiB"} if name == "lstm" and mode != "keep" else {}
    model, outcome = moved(MODELS[name], tmp_path, mode, **room)
    t.assert_same(plain(MODELS[name]), outcome)
    report = offload.report(model).as_dict()
    assert report["arena_peak_bytes"] <= 64 * MIB
    assert report["activation_live_bytes"] == 0
    assert (report["activation_saved_bytes"] > 0) == (mode != "keep")


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
@pytest.mark.parametrize("mode", ["host", "disk", "recompute"])
def test_training_is_exact_with_everything_on_disk(mode: str, engine: str, tmp_path: Path) -> None:
    """Parameters, gradients, state and activations, in less memory than any of them needs."""
    small = {"io_block_bytes": "256KiB", "io_engine": engine, "encrypt_swap": engine == "threads"}
    least = t.least_budget(t.Stack, activations=mode, activation_bytes=4096, **small)
    loop = Loop(steps=3)
    ours = t.offloaded(
        t.Stack,
        loop,
        tmp_path,
        least + 2 * MIB,
        activations=mode,
        activation_bytes=MIB,
        **small,
    )
    t.assert_same(t.plain(t.Stack, loop), ours)


@pytest.mark.parametrize("mode", ["host", "disk", "auto"])
def test_what_does_not_fit_goes_to_disk(mode: str, tmp_path: Path) -> None:
    model, _ = moved(Gpt, tmp_path, mode)
    report = offload.report(model).as_dict()
    assert report["activation_write_bytes"] > 0
    assert report["activation_read_bytes"] > 0
    assert report["activation_left_bytes"] == 0
    assert "activations" in str(offload.report(model))


def test_what_fits_stays_in_memory(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        model, _ = moved(Gpt, tmp_path, "host", swap_dir=folder, activation_bytes="40MiB")
        assert offload.report(model).as_dict()["activation_write_bytes"] == 0


def test_recomputing_saves_the_inputs_of_blocks_alone(tmp_path: Path) -> None:
    saved = {}
    for mode in ("disk", "recompute"):
        model, _ = moved(Gpt, tmp_path, mode)
        saved[mode] = offload.report(model).as_dict()["activation_saved_bytes"]
    assert saved["recompute"] < saved["disk"] / 4


def test_auto_recomputes_where_there_is_no_disk(tmp_path: Path) -> None:
    model, outcome = moved(Gpt, tmp_path, "auto", swap_dir=None, activation_bytes="24MiB")
    t.assert_same(plain(Gpt), outcome)
    notes = offload.report(model).notes
    assert not any("0 are recomputed" in note for note in notes), notes
    assert any("4 blocks" in note and "recomputed" in note for note in notes), notes


def test_a_model_without_blocks_says_that_nothing_is_recomputed(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y

    policy = offload.Policy(budget=offload.Budget(host="64MiB"), activations="recompute")
    model = offload.wrap(Flat(), policy)
    model(torch.randn(256, 256)).sum().backward()
    assert any("no blocks" in note for note in offload.report(model).notes)


def test_batches_of_other_sizes_than_before_are_exact(tmp_path: Path) -> None:
    """The largest comes last, when it was learnt that everything stays in memory."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        found = []
        for length in (16, 16, 256, 64, 256, 8):
            model(torch.arange(length).remainder(64).expand(4, -1)).square().mean().backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found

    torch.manual_seed(0)
    expected = run(Gpt())
    for mode in MODES[1:]:
        torch.manual_seed(0)
        policy = offload.Policy(
            budget=offload.Budget(host="64MiB"),
            swap_dir=tmp_path,
            activations=mode,
            activation_bytes="5MiB",
            debug=True,
        )
        model = offload.wrap(Gpt(), policy)
        for ours, theirs in zip(run(model), expected, strict=True):
            assert torch.equal(ours, theirs), mode


@pytest.mark.parametrize("make", [Images, Dropping])
def test_unwrap_puts_the_forwards_back(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, _ = moved(make, tmp_path, "recompute")
    assert any("forward" in m.__dict__ for m in model.modules())
    offload.unwrap(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    model(torch.arange(48).view(4, 12)).sum().backward()
