"""What the workers of a DataLoader cost in memory beside a wrapped model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import training as t
from torch.utils.data import DataLoader, Dataset

import offload

MIB = 2**20
BUDGET = 112 * MIB
WORKERS = 2

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def private_bytes() -> int:
    """Memory of this process that it shares with no other and that no file backs."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Private_Dirty:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


class Tokens(Dataset[tuple[torch.Tensor, int, int]]):
    """Samples that tell which process made them and how much memory it has for itself."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return torch.full((12,), index), os.getpid(), private_bytes()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no smaps_rollup here")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_data_loader_workers_share_the_arena(tmp_path: Path) -> None:
    """Forked while updates are in flight, no worker gets a copy of the arena."""
    model = t.wrapped(lambda: t.Stack(layers=32), tmp_path, BUDGET, debug=False)
    optimizer = offload.AdamW(model.parameters())

    def step(tokens: torch.Tensor) -> None:
        model(tokens[:, :-1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(torch.arange(24).view(2, 12))
    step(torch.arange(24).view(2, 12))
    assert offload.report(model).as_dict()["arena_peak_bytes"] > 0.8 * BUDGET
    assert private_bytes() > 0.8 * BUDGET
    cost: dict[int, int] = {}
    loader = DataLoader(
        Tokens(), 1, num_workers=WORKERS, multiprocessing_context="fork", timeout=20
    )
    for tokens, pids, private in loader:
        step(tokens)
        cost[int(pids)] = max(cost.get(int(pids), 0), int(private))
    assert len(cost) == WORKERS
    assert os.getpid() not in cost
    assert max(cost.values()) < BUDGET // 2, cost
