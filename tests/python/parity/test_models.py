"""Each architecture of the table is trained to the same bits with and without offload."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison import assert_parity, batches
from zoo import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_exact(case: Case, tmp_path: Path) -> None:
    assert_parity(case.make, batches(case), tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_exact_with_every_module_a_unit(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks use weights of their parts by themselves; nothing is too small to be spilled."""
    monkeypatch.setattr("offload.planner.placement.SMALL_BYTES", 0)
    data = batches(case)
    assert_parity(case.make, data, tmp_path, max_unit_bytes=1)
    assert_parity(case.make, data, tmp_path, max_unit_bytes=1, lazy_step=False)


def test_the_documentation_lists_the_models() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    for case in CASES:
        assert f"`{case.model.__name__}`" in text
