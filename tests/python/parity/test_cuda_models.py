"""The table of architectures on a CUDA device: the bits of a plain model there."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison import assert_parity, batches
from zoo import CASES, Case

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_on_cuda_is_exact(case: Case, tmp_path: Path) -> None:
    assert_parity(case.make, batches(case), tmp_path)
