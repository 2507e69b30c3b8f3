"""benchmarks/convergence.py, a few steps of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Quick = Callable[..., dict[str, Any]]


def test_convergence(quick: Quick, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(1000)))
    result = quick("convergence.py", "--data", str(text))
    assert [row["state_format"] for row in result["rows"]] == ["float32", "bfloat16", "int8"]
    first = {row["losses"][0] for row in result["rows"]}
    assert len(first) == 1  # the same weights and the same batch
    curves = {tuple(row["losses"]) for row in result["rows"]}
    assert len(curves) == 3  # the formats are in use
