"""The examples are scripts, not a package: their folder goes on the path, as when one is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 90 KB of text that repeats little."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(4000)))
    return path
