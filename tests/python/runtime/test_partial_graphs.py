"""Loops that are not one forward, one backward, one step: the same bits as without offload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload

Loop = Callable[[nn.Module, torch.optim.Optimizer], list[torch.Tensor]]


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    data = tokens(seed)
    logits = model(data[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())


def several_forwards(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Two forwards, of different lengths, then one backward through both."""
    losses = [loss_of(model, 0), model(tokens(1)[:, :5]).square().mean()]
    sum(losses).backward()  # type: ignore[union-attr]
    return losses


def interleaved(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The backwards in the order of the forwards, with an evaluation between them."""
    first, second = loss_of(model, 0), loss_of(model, 1)
    first.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.eval()
        between = loss_of(model, 2)
        model.train()
    second.backward()  # type: ignore[no-untyped-call]
    return [first, between, second]


def retained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    (loss * 0.5).backward()  # type: ignore[no-untyped-call]
    return [loss]


def detached(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The lower half gets no gradient."""
    x = model.embed(tokens(0))  # type: ignore[operator]
    for block in list(model.blocks)[:5]:  # type: ignore[arg-type]
        x = block(x)
    x = x.detach()
    for block in list(model.blocks)[5:]:  # type: ignore[arg-type]
        x = block(x)
    loss = model.head(x).square().mean()  # type: ignore[operator]
    loss.backward()
    return [loss]


def some_inputs(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """``backward(inputs=...)``: gradients for these parameters alone."""
    chosen = [p for n, p in model.named_parameters() if "blocks.3" in n or "head" in n]
    loss = loss_of(model, 0)
    loss.backward(inputs=chosen)  # type: ignore[no-untyped-call]
    loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
    return [loss]


def grad_then_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """``autograd.grad`` for a few parameters and for an activation, then an ordinary backward."""
    x = model.embed(tokens(0)).detach().requires_grad_()  # type: ignore[operator]
    y = x
    for block in model.blocks:  # type: ignore[union-attr]
        y = block(y)
    loss = model.head(y).square().mean()  # type: ignore[operator]
    params = list(model.blocks[2].parameters())  # type: ignore[index, union-attr]
    found = torch.autograd.grad(loss, [x, *params], retain_graph=True)
    loss.backward()
    return [loss, *found]


def skipped_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """A step whose gradients are thrown away, as after an overflow."""
    loss = loss_of(model, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    again = loss_of(model, 1)
    again.backward()  # type: ignore[no-untyped-call]
    return [loss, again]


def forward_of_a_part(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Submodules called by themselves, outside of the model's forward."""
    x = torch.linspace(-1, 1, 2 * 4 * 256).view(2, 4, 256)
    loss = model.blocks[7](model.blocks[1](x)).square().mean()  # type: ignore[index, operator]
    loss.backward()
    return [loss]


def called_functionally(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """``functional_call`` with some parameters replaced; gradients go to the replacements too."""
    own = dict(model.named_parameters())
    name = "blocks.4.mix.weight"
    replaced = (own[name].detach().clone() * 1.5).requires_grad_()
    data = tokens(0)
    logits = torch.func.functional_call(model, {name: replaced}, (data[:, :-1],))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert replaced.grad is not None
    return [loss, replaced.grad]


def penalized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """A loss that uses the parameters themselves, outside of forward."""
    loss = loss_of(model, 0)
    penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
    total = loss + 1e-3 * penalty
    total.backward()  # type: ignore[no-untyped-call]
    return [loss, penalty]


LOOPS: list[Loop] = [
    several_forwards,
    interleaved,
    retained,
    detached,
    some_inputs,
    grad_then_backward,
    skipped_step,
    forward_of_a_part,
    called_functionally,
    penalized,
]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, loop: Loop) -> dict[str, Any]:
    """Three steps of `loop`; what it returned, the gradients, and the weights at the end."""
    found: dict[str, Any] = {}
    for step in range(3):
        found[f"{step}"] = [value.detach().clone() for value in loop(model, optimizer)]
        for name, param in model.named_parameters():
            found[f"{step} {name}"] = None if param.grad is None else param.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = {k: v.clone() for k, v in model.state_dict().items()}
    return found


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_equal(ours[key], value, f"{where} {key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            assert_equal(ours[i], value, f"{where} [{i}]")
    else:
        assert theirs is None, where
        assert ours is None, where


def pair(tmp_path: Path, make: t.Model = t.Stack) -> tuple[nn.Module, nn.Module]:
    """The same model wrapped, with a small budget, and plain."""
    ours = t.wrapped(make, tmp_path, t.least_budget(make) + (1 << 20))
    torch.manual_seed(0)
    return ours, make()


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_loop_is_exact(loop: Loop, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    found = run(ours, offload.AdamW(ours.parameters(), lr=1e-2), loop)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)
    assert_equal(found, run(theirs, plain, loop))
    report = offload.report(ours).as_dict()
    assert report["disk_write_bytes"] > 0
    assert report["arena_peak_bytes"] <= report["arena_budget_bytes"]


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 256)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(256, 1024), nn.LeakyReLU(0.2), nn.Linear(1024, 512), nn.Linear(512, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def adversarial(
    models: tuple[nn.Module, nn.Module], make_optimizer: Callable[[nn.Module], Any]
) -> dict[str, Any]:
    """Goodfellow's loop: the discriminator on real and detached fakes, the generator through it."""
    generator, judge = models
    optimizers = [make_optimizer(model) for model in models]
    noise = torch.Generator().manual_seed(3)
    bce = nn.functional.binary_cross_entropy_with_logits
    found: dict[str, Any] = {}
    for step in range(3):
        real = torch.randn(8, 256, generator=noise)
        fake = generator(torch.randn(8, 32, generator=noise))
        judged = bce(judge(real), torch.ones(8, 1)) + bce(judge(fake.detach()), torch.zeros(8, 1))
        judged.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        made = bce(judge(fake), torch.ones(8, 1))
        made.backward()
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        found[f"{step}"] = [judged.detach(), made.detach()]
    for i, model in enumerate(models):
        found[f"weights {i}"] = {k: v.clone() for k, v in model.state_dict().items()}
    return found


def test_an_adversarial_loop_of_two_wrapped_models_is_exact(tmp_path: Path) -> None:
    kinds: tuple[t.Model, t.Model] = (Generator, Discriminator)
    small = {"io_block_bytes": "64KiB"}
    ours = [
        t.wrapped(make, tmp_path, t.least_budget(make, **small) + (1 << 18), **small)
        for make in kinds
    ]
    theirs = []
    for make in kinds:
        torch.manual_seed(0)
        theirs.append(make())
    found = adversarial((ours[0], ours[1]), lambda m: offload.AdamW(m.parameters(), lr=1e-3))
    plain = adversarial(
        (theirs[0], theirs[1]),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, foreach=False),
    )
    assert_equal(found, plain)
    assert all(offload.report(model).as_dict()["disk_write_bytes"] > 0 for model in ours)
