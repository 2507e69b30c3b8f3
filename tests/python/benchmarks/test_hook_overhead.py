"""benchmarks/hook_overhead.py, a few steps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Quick = Callable[..., dict[str, Any]]


def test_hook_overhead(quick: Quick) -> None:
    result = quick("hook_overhead.py")
    assert [row["model"] for row in result["rows"]] == ["demo", "tiny"]
    assert all(row["plain_ms"] > 0 for row in result["rows"])
    assert all(row["min"] <= row["ratio"] <= row["max"] for row in result["rows"])
