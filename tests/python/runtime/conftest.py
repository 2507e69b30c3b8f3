"""The helper module training.py lies beside these tests, measured.py beside others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "deferred"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Workers and OpenMP threads on few cores wait for one another for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
