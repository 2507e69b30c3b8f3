"""A process that forks beside a wrapped model: the child is told, the parent trains on exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training as t
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offload

BUDGET = 16 << 20
TOKENS = torch.arange(24).view(2, 12)

# From Python 3.12 on os.fork() warns when the process has threads; that is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def in_child(run: Callable[[], str]) -> str:
    """Return what `run` returns in a forked child that exits with os._exit(), or is killed."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # a child that hangs dies of it
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not in the child
            os.write(writable, run().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child hung or failed"
    return said


def error_of(use: Callable[[], object]) -> str:
    """The message of the OffloadError that `use` raises."""
    try:
        result = use()
    except offload.OffloadError as error:
        return str(error)
    return f"no error: {result}"


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, beside: Callable[[], None] | None, steps: int = 3) -> t.Outcome:
    """Train, with `beside` called where transfers and updates are in flight."""
    wrapped = beside is not None
    kind = offload.AdamW if wrapped else torch.optim.AdamW
    optimizer = kind(t.groups(model), lr=1e-2, weight_decay=0.1, foreach=False)
    outcome, data = t.Outcome(), torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = loss_of(model, torch.randint(0, 64, (2, 12), generator=data))
        loss.backward()  # type: ignore[no-untyped-call]
        outcome.losses.append(loss.item())
        if beside is not None:
            beside()  # between backward and step
        optimizer.step()
        if beside is not None:
            beside()  # updates are pending
        optimizer.zero_grad()
    outcome.weights = {k: v.clone() for k, v in model.state_dict().items()}
    return outcome


def plain(steps: int = 3) -> t.Outcome:
    torch.manual_seed(0)
    return train(t.Stack(), None, steps)


@pytest.mark.parametrize("lazy_step", [True, False])
def test_the_child_is_told_and_the_parent_trains_on(lazy_step: bool, tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET, lazy_step=lazy_step)
    messages = []

    def fork() -> None:
        messages.append(in_child(lambda: error_of(lambda: model(TOKENS).sum().item())))

    t.assert_same(plain(), train(model, fork))
    assert len(messages) == 6
    for message in messages:
        assert "this is a forked child" in message


@pytest.mark.parametrize("use", ["state_dict", "clone", "norm", "step", "unwrap"])
def test_other_uses_in_a_child_are_refused(use: str, tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    optimizer = offload.AdamW(model.parameters())
    loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    uses: dict[str, Callable[[], object]] = {
        "state_dict": lambda: sum(v.sum().item() for v in model.state_dict().values()),
        "clone": lambda: sum(p.clone().sum().item() for p in model.parameters()),
        "norm": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(),
        "step": optimizer.step,
        "unwrap": lambda: offload.unwrap(model),
    }
    assert "this is a forked child" in in_child(lambda: error_of(uses[use]))
    assert all(p.clone().isfinite().all() for p in model.parameters())


def test_a_child_that_uses_no_model_ends_cleanly(tmp_path: Path) -> None:
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    assert in_child(lambda: str(torch.ones(3).sum().item())) == "3.0"
    other = tmp_path / "other"
    other.mkdir()

    def wraps_its_own() -> str:
        own = t.wrapped(t.Stack, other, BUDGET)
        finite = own(TOKENS).isfinite().all().item()
        offload.unwrap(own)
        return str(finite)

    assert in_child(wraps_its_own) == "True"
    assert model(TOKENS).isfinite().all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_data_loader_workers_beside_a_wrapped_model(tmp_path: Path) -> None:
    data = torch.randint(0, 64, (12, 12), generator=torch.Generator().manual_seed(2))

    def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, workers: int) -> t.Outcome:
        loader = DataLoader(
            TensorDataset(data),
            batch_size=2,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            timeout=20 if workers else 0,
        )
        outcome = t.Outcome()
        for _ in range(2):
            for (tokens,) in loader:  # the workers are forked anew for each epoch
                optimizer.zero_grad()
                loss = loss_of(model, tokens)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                outcome.losses.append(loss.item())
        outcome.weights = {k: v.clone() for k, v in model.state_dict().items()}
        return outcome

    torch.manual_seed(0)
    model: nn.Module = t.Stack()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    expected = epochs(model, optimizer, 0)
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    t.assert_same(expected, epochs(model, offload.AdamW(model.parameters()), 2))
    assert len(expected.losses) == 12
