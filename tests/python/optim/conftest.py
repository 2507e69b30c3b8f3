"""The helper modules lie beside these tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def tiny_states_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spill tensors that are so small that it is not worth it."""
    monkeypatch.setattr("offload.optim.state_map.SMALL_BYTES", 32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked child has none of the threads that torch computes with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
