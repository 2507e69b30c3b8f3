"""What a spilled step reads ahead, writes behind, and leaves in memory."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from spilled import disk_bytes, policy, set_gradients
from torch import nn

from offload import OffloadError
from offload.optim import spill

KIB = 1024
SLAB = 256 * KIB  # of one parameter, a whole number of blocks


def make(folder: Path, count: int, host: int, cls: Any = torch.optim.SGD) -> tuple[Any, list[Any]]:
    params = [nn.Parameter(torch.zeros(256, 256)) for _ in range(count)]
    return spill(cls, params, policy=policy(folder, host), lr=0.1, momentum=0.9), params


def steps(optimizer: Any, params: list[Any], count: int) -> list[tuple[int, int]]:
    """Bytes written and read by each step."""
    found = []
    for step in range(count):
        before = disk_bytes(optimizer)
        set_gradients(step + 2, params)
        optimizer.step()
        for slab in [optimizer._spill.states.slab(p) for p in params]:
            optimizer._spill._home.mover.settle(slab)
        found.append(tuple(b - a for a, b in zip(before, disk_bytes(optimizer), strict=True)))
    return found


def test_what_fits_is_never_written(tmp_path: Path) -> None:
    optimizer, params = make(tmp_path, 8, 8 * SLAB)
    steps(optimizer, params, 1)  # whether all will fit is not known yet
    assert steps(optimizer, params, 3)[1:] == [(0, 0), (0, 0)]


def test_what_does_not_fit_passes_through(tmp_path: Path) -> None:
    """Of 16 slabs 5 stay in memory, with room for 8 that pass, on a disk that is fast enough."""

    class Patient(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for param in params:  # what is still being written would have to stay, and save a read
                if (slab := optimizer._spill.states.slab(param)) is not None:
                    optimizer._spill._home.mover.settle(slab)
            super().step(closure)

    params: list[Any] = []
    optimizer, params = make(tmp_path, 16, 13 * SLAB, Patient)
    steps(optimizer, params, 2)
    found = steps(optimizer, params, 4)
    assert [written for written, _ in found] == 4 * [11 * SLAB]
    reads = sum(read for _, read in found)
    assert abs(reads - 4 * 11 * SLAB) <= 4 * SLAB  # what came ahead of the first step, or the next
    usage = optimizer._spill._home.mover.ring.usage()
    assert usage["peak"] <= 13 * SLAB


@pytest.mark.parametrize("host", [1, 2])
def test_hardly_any_memory(host: int, tmp_path: Path) -> None:
    optimizer, params = make(tmp_path, 6, host * SLAB)
    found = steps(optimizer, params, 6)[1:]
    assert [written for written, _ in found] == 5 * [6 * SLAB]
    assert sum(read for _, read in found) <= (5 * 6 + host) * SLAB


def test_the_next_state_is_read_while_a_parameter_is_stepped(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            here = next(
                (i for i, p in enumerate(params) if p is self.param_groups[0]["params"][0]), None
            )
            if here is not None and here + 1 < len(params):
                slab = optimizer._spill.states.slab(params[here + 1])
                seen.append(slab is not None and slab.lease is not None)
            time.sleep(0.02)  # longer than it takes to write the state of the one before
            super().step(closure)

    params: list[Any] = []
    optimizer, params = make(tmp_path, 10, 4 * SLAB, Watched)
    steps(optimizer, params, 1)
    seen.clear()
    steps(optimizer, params, 1)
    assert seen == [True] * 9


def test_a_dropped_optimizer_closes_its_files(tmp_path: Path) -> None:
    optimizer, params = make(tmp_path, 4, 2 * SLAB)
    steps(optimizer, params, 1)
    store = optimizer._spill._home.store
    home = weakref.ref(optimizer._spill._home)
    del optimizer
    gc.collect()
    assert home() is None
    with pytest.raises(OffloadError, match="closed"):
        store.create(1)


def test_small_tensors_stay(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.zeros(100, 100)), nn.Parameter(torch.zeros(128, 128))]
    optimizer: Any = spill(torch.optim.NAdam, params, policy=policy(tmp_path, 1024 * KIB))
    set_gradients(2, params)
    optimizer.step()
    slabs = [optimizer._spill.states.slab(p) for p in params]
    assert slabs[0] is None
    assert slabs[1].nbytes == 2 * 128 * 128 * 4
