"""benchmarks/optim.py: that it runs to its end, and measures what it says."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_peers.bandwidth import HUGE_PAGES
from optim_peers.engine import mixed
from optim_peers.field import Contestant, Field, fastest, ratio_bar, take_turns
from optim_peers.memory_comparison import FORMATS
from optim_peers.parameters import gpt_shapes, make_parameters

ROOT = Path(__file__).resolve().parents[3]
Quick = Callable[..., dict[str, Any]]


def test_state_in_memory(quick: Quick, direct_folder: Path) -> None:
    peer = str(direct_folder / "no-such-venv")
    how = ("--only", "memory", "--swap-dir", str(direct_folder), "--peer-venv", peer)
    result = quick("optim.py", *how)
    lines = {row["run"]: row for row in result["rows"] if "run" in row}
    assert lines.pop("deepspeed")["settings"] == "not installed: skipped"
    assert list(lines) == [*(f"offload {f.name}" for f in FORMATS), "torch fused"]
    for line in lines.values():
        assert 0 < line["min_ms"] <= line["ms"] <= line["max_ms"]
        assert line["limit_reached"] == pytest.approx(line["limit_ms"] / line["ms"])
    assert [path.name for path in direct_folder.iterdir()] == ["found.json"]


def test_state_on_disk(quick: Quick, direct_folder: Path) -> None:
    peer = str(direct_folder / "no-such-venv")
    how = ("--only", "disk", "--swap-dir", str(direct_folder), "--peer-venv", peer)
    result = quick("optim.py", *how)
    lines = {row["run"]: row for row in result["rows"] if "run" in row}
    ours, alone = lines["offload"], lines["disk alone"]
    # fp32 moments but for what the budget keeps, and the disk alone has as much to do
    assert 4 < ours["read_bytes_per_param"] < 8
    read = pytest.approx(ours["read_bytes_per_param"], rel=0.05)
    assert alone["read_bytes_per_param"] == read
    written = pytest.approx(ours["written_bytes_per_param"], rel=0.05)
    assert alone["written_bytes_per_param"] == written
    assert ours["limit_ms"] == max(alone["ms"], lines["memory alone"]["ms"])
    assert lines["deepspeed"]["settings"] == "not installed: skipped"
    assert lines["mapped file"]["settings"] in ("fused", "no memory cgroup: skipped")
    assert [path.name for path in direct_folder.iterdir()] == ["found.json"]


def test_the_parameters_are_those_of_the_gpt() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(layers=2, width=32, heads=2))
    assert gpt_shapes(2, 32) == [list(p.shape) for p in model.parameters()]


def test_everyone_has_the_same_parameters() -> None:
    one, other = (make_parameters([[8, 4], [8]]) for _ in range(2))
    for p, q in zip(one, other, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


def test_bytes_of_an_update() -> None:
    assert [form.moved_bytes for form in FORMATS] == [28, 20, 16.0625]


def test_the_bandwidth_is_measured_with_as_many_bytes(tmp_path: Path) -> None:
    options = argparse.Namespace(peer_venv=None, swap_dir=str(tmp_path), threads=1)
    with Field(options, [[1000, 1000]]) as field:
        worker = field.start("bandwidth", {}, env=HUGE_PAGES)
        for form in FORMATS:
            found = worker.ask({"state_bytes": form.state_bytes, "steps": 1})
            assert found["bytes"] == pytest.approx(form.moved_bytes * field.numel, rel=1e-4)


def test_reads_and_writes_are_mixed_evenly() -> None:
    assert list(mixed(2, 4)) == [True, False, False, True, False, False]
    for reads, writes in ((0, 3), (3, 0), (7, 5), (5, 5)):
        order = list(mixed(reads, writes))
        assert (order.count(True), order.count(False)) == (reads, writes)


def test_nobody_always_follows_the_same_one() -> None:
    order: list[str] = []

    def contestant(name: str) -> Contestant:
        def turn() -> dict[str, Any]:
            order.append(name)
            return {"seconds": len(order)}

        return Contestant(name, turn)

    contestants = [contestant("a"), contestant("b"), contestant("c")]
    take_turns(contestants, 3)
    assert "".join(order) == "abcacbcab"
    assert contestants[0].seconds == [1, 4, 8]


def test_the_fastest_setting_is_chosen() -> None:
    class Peer:
        asked = 0

        def ask(self, setting: dict[str, Any]) -> dict[str, Any]:
            self.asked += 1
            return {"seconds": setting["seconds"] / self.asked}

    settings = [{"seconds": 3.0}, {"seconds": 1.0}, {"seconds": 2.0}]
    assert fastest(Peer(), settings, quick=False) == settings[1]  # type: ignore[arg-type]
    assert fastest(Peer(), settings, quick=True) == settings[0]  # type: ignore[arg-type]


def test_a_ratio_is_taken_within_each_round() -> None:
    bar = ratio_bar("a / b", [2.0, 30.0, 8.0], [1.0, 10.0, 2.0], 2.5, at_least=True)
    assert math.isclose(bar.value, 3.0)
    assert bar.holds
    assert "(2 to 4)" in bar.name
