"""Each architecture of the table is trained to the same bits with and without offload."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison import assert_parity, batches
from zoo import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_exact(case: Case, tmp_path: Path) -> None:
    assert_parity(case.make, batches(case), tmp_path)
