"""Exceptions, Ctrl-C and SIGKILL: the model stays usable, the disk stays clean."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.tiers.unit import SpilledParameter

BUDGET = 16 << 20
TOKENS = torch.arange(24).view(2, 12)


class Interrupting(t.Stack):
    """Raises in the middle of the forward or of the backward, once armed."""

    armed: tuple[str, type[BaseException]] | None = None

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = block(x)
        if self.armed is not None and block is self.blocks[5]:
            where, error = self.armed
            if where == "forward":
                raise error
            y.register_hook(self._raise)
        return y

    def _raise(self, grad: torch.Tensor) -> None:
        assert self.armed is not None
        raise self.armed[1]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_after_an_exception_training_goes_on_exactly(
    where: str, error: type[BaseException], tmp_path: Path
) -> None:
    loop = t.Loop(steps=2)
    results = []
    for make in (Interrupting, lambda: t.wrapped(Interrupting, tmp_path, BUDGET)):
        torch.manual_seed(0)
        model = make()
        kind = torch.optim.AdamW if make is Interrupting else offload.AdamW
        optimizer = kind(t.groups(model), lr=1e-2, weight_decay=0.1, foreach=False)
        first = t.train(model, optimizer, loop)
        model.armed = (where, error)
        with pytest.raises(error):
            model(TOKENS).square().sum().backward()
        model.armed = None
        optimizer.zero_grad()
        second = t.train(model, optimizer, loop)
        second.losses = first.losses + second.losses
        results.append(second)
    t.assert_same(*results)


def test_an_interrupted_model_gives_its_memory_back(tmp_path: Path) -> None:
    model = t.wrapped(Interrupting, tmp_path, BUDGET)
    for where in ("forward", "backward", "forward"):
        for _ in range(5):
            model.armed = (where, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                model(TOKENS).square().sum().backward()
    model.armed = None
    model(TOKENS).square().sum().backward()
    context = model._offload_wrapped.context
    assert context.scopes.none_open
    assert not context.gradients.in_backward
    assert all(unit.param_slab.locks == 0 for unit in context.units)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


SCRIPT = """
    import signal, sys
    sys.path.insert(0, {tests!r})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    import torch, offload
    import training as t
    model = t.wrapped(t.Stack, {swap!r}, {budget})
    optimizer = offload.AdamW(model.parameters())
    data = torch.Generator().manual_seed(1)
    print("ready", flush=True)
    while True:
        try:
            for _ in range(2):
                model(torch.randint(0, 64, (2, 12), generator=data)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        except KeyboardInterrupt:
            optimizer.zero_grad()
            model(torch.randint(0, 64, (2, 12), generator=data)).square().sum().backward()
            optimizer.step()
            ok = all(bool(torch.isfinite(p.clone()).all()) for p in model.parameters())
            print("usable" if ok else "broken", flush=True)
"""


@contextmanager
def started(swap: Path) -> Iterator[subprocess.Popen[str]]:
    """The script above, training; killed at the end."""
    script = textwrap.dedent(SCRIPT).format(
        tests=str(Path(__file__).parent), swap=str(swap), budget=BUDGET
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_sigkill_leaves_nothing_on_disk(tmp_path: Path) -> None:
    for delay in (0.0, 0.3, 0.7):
        with started(tmp_path) as process:
            time.sleep(delay)
            assert list(tmp_path.iterdir()) == []  # while it runs, too: the file has no name
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
        assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_process_and_model_usable(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        assert process.stdout is not None
        for delay in (0.05, 0.2, 0.11, 0.17):
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "usable\n"


def test_a_detach_that_was_interrupted_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come after any parameter of a unit, and before its class was changed."""
    model = t.wrapped(t.Stack, tmp_path, BUDGET, max_unit_bytes="2MiB")
    context = model._offload_wrapped.context
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    unit = next(u for u in context.units if not u.param_slab.pinned and len(u.params) > 2)
    with context.held(unit):
        first, second = unit.params[:2]
        first.param.data = first.placeholder
        first.param.__class__ = SpilledParameter
        second.param.data = second.placeholder
    assert not unit.attached
    assert all(type(p.param) is SpilledParameter for p in unit.params)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
