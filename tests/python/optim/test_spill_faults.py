"""spill() on a failing or full disk: each parameter and its state stay of the same step."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from spilled import parameters, policy, same_bits, set_gradients
from torch import nn

from offload import SwapIOError, SwapSpaceError
from offload.optim import spill

pytestmark = pytest.mark.usefixtures("tiny_states_too")

SHAPES = [(40, 40)] * 6


class Failing:
    """A Transfer that ends with an error."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise SwapIOError(errno.EIO, "the disk is gone", "/swap")


class Disk:
    """A swap store of which some transfers fail, when they are submitted or when they end."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.fails: set[str] = set()
        self.late = True
        self.after = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def _transfer(self, kind: str, *args: Any, **kw: Any) -> Any:
        if kind in self.fails:
            self.after -= 1
            if self.after < 0:
                if self.late:
                    return Failing()
                Failing().wait()
        return getattr(self.store, kind)(*args, **kw)

    def read(self, *args: Any, **kw: Any) -> Any:
        return self._transfer("read", *args, **kw)

    def write(self, *args: Any, **kw: Any) -> Any:
        return self._transfer("write", *args, **kw)


class Twin:
    """A spilled optimizer on a disk that may fail, and what the real class makes of each step."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = parameters(SHAPES), parameters(SHAPES)
        self.spilled: Any = spill(torch.optim.NAdam, self.ours, policy=policy(folder, 40 << 10))
        self.real = torch.optim.NAdam(self.theirs)
        self.disk = Disk(self.spilled._spill._home.mover.store)
        self.spilled._spill._home.mover.store = self.disk

    def snapshot(self) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        return [
            (p.detach().clone(), {k: v.clone() for k, v in self.real.state[p].items()})
            for p in self.theirs
        ]

    def gradients(self, step: int) -> None:
        set_gradients(10 + step, self.ours, self.theirs)

    def is_of(self, i: int, when: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> bool:
        value, state = when[i]
        found = self.spilled.state[self.ours[i]]
        return same_bits(self.ours[i], value) and all(
            key in found and same_bits(found[key], tensor) for key, tensor in state.items()
        )


def some_steps(optimizer: Any) -> None:
    """The failure of a write may show in the next step."""
    for _ in range(3):
        optimizer.step()


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_failing_disk(kind: str, after: int, late: bool, tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    for step in range(2):
        twin.gradients(step)
        twin.spilled.step()
        twin.real.step()
    before = twin.snapshot()
    twin.gradients(2)
    twin.real.step()
    past = twin.snapshot()
    twin.disk.fails, twin.disk.after, twin.disk.late = {kind}, after, late
    with pytest.raises(SwapIOError, match="the disk is gone") as failed:
        some_steps(twin.spilled)
    assert failed.value.errno == errno.EIO
    notes = getattr(failed.value, "__notes__", ["spill(): raised while stepping"])
    assert any("raised while stepping" in note for note in notes)
    twin.disk.fails = set()
    if kind == "read":
        done = [twin.is_of(i, past) for i in range(len(SHAPES))]
        assert done == sorted(done, reverse=True)  # the first ones
        assert all(twin.is_of(i, before) for i, d in enumerate(done) if not d)
        assert not all(done)
    for p in twin.ours:  # what was left half-way is not lost
        assert list(twin.spilled.state[p]) == list(twin.real.state[twin.theirs[0]])
    twin.spilled.step()


def test_a_full_disk_at_the_first_step(tmp_path: Path) -> None:
    """Space is reserved when state comes into being; what has none stays in memory."""
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    disk = 640 << 10  # blocks are 64 KiB: room for a few objects, and for replacing them
    spilled = spill(torch.optim.NAdam, ours, policy=policy(tmp_path, 40 << 10, disk=disk))
    real = torch.optim.NAdam(theirs)
    set_gradients(0, ours, theirs)
    with pytest.raises(SwapSpaceError, match=rf"Budget\(disk={disk}\) is too small"):
        spilled.step()
    real.step()
    done = [same_bits(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert done == sorted(done, reverse=True)
    assert any(done)
    assert not all(done)
    for ok, a, b in zip(done, ours, theirs, strict=True):
        if ok:
            assert same_bits(spilled.state[a]["exp_avg"], real.state[b]["exp_avg"])
        else:
            assert not spilled.state[a]


def test_an_error_of_the_class_is_the_class_s_own(tmp_path: Path) -> None:
    """What it had done before stays, as in torch."""

    class Picky(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                if any(p.shape == (7, 7) for p in group["params"]):
                    raise ValueError("seven")
            return result

    params = [*parameters([(40, 40)] * 2), nn.Parameter(torch.ones(7, 7)), *parameters([(9, 9)])]
    optimizer = spill(Picky, params, policy=policy(tmp_path), lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="seven"):
        optimizer.step()
    assert [bool(optimizer.state[p]) for p in params] == [True, True, True, False]
    assert torch.equal(params[2].detach(), torch.full((7, 7), 0.9))
