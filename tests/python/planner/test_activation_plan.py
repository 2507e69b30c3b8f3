"""Which blocks are recomputed, and what part of the budget activations get."""

from __future__ import annotations

import math

import pytest

from offload.errors import BudgetError
from offload.planner import (
    BlockCost,
    DiskSpec,
    Rates,
    UnitSpec,
    activation_share,
    choose_treatment,
    place,
    smallest_budget,
)
from offload.planner.activations import LEAST_BYTES

MIB = 1 << 20
BLOCKS = [BlockCost(f"blocks.{i}", 100 * MIB, 10 * MIB, 0.1) for i in range(4)]
FAST = 1e12


def test_what_fits_stays_in_memory() -> None:
    choice = choose_treatment(BLOCKS, 0, Rates(400 * MIB, 0.0, 0.0))
    assert choice.treatment == ("host",) * 4
    assert choice.disk_bytes == 0
    assert choice.seconds == pytest.approx(0.4 + 0.8)


def test_a_fast_disk_takes_what_does_not_fit_and_hides() -> None:
    choice = choose_treatment(BLOCKS, 0, Rates(150 * MIB, FAST, FAST))
    assert choice.treatment == ("disk", "disk", "disk", "host")
    assert choice.disk_bytes == 250 * MIB
    assert choice.seconds == pytest.approx(1.2)


def test_without_a_disk_so_many_are_recomputed_that_the_rest_fits() -> None:
    choice = choose_treatment(BLOCKS, 0, Rates(220 * MIB, 0.0, 0.0))
    assert choice.treatment == ("recompute", "recompute", "host", "host")
    assert choice.seconds == pytest.approx(0.4 + 0.8 + 0.2)


def test_a_slow_disk_is_used_as_far_as_it_hides() -> None:
    """Writing 100 MiB takes as long as the forward, reading them half of the backward."""
    rate = 100 * MIB / 0.4
    choice = choose_treatment(BLOCKS, 0, Rates(100 * MIB, rate, rate))
    # 0 recomputed: max(.4, 1.2) + max(.8, 1.2). 1: 210 MiB, .84 + .9. 2: 120 MiB, .48 + 1.0.
    # 3: 30 MiB, .4 + 1.1. 4: nothing, .4 + 1.2.
    assert choice.treatment.count("recompute") == 2
    assert choice.seconds == pytest.approx(1.48)


def test_a_disk_that_is_busy_takes_less() -> None:
    rate = 100 * MIB / 0.4
    idle = choose_treatment(BLOCKS, 0, Rates(100 * MIB, rate, rate))
    busy = choose_treatment(BLOCKS, 0, Rates(100 * MIB, rate, rate, busy_seconds=1.2))
    assert busy.disk_bytes < idle.disk_bytes


def test_the_block_that_saves_most_for_its_time_is_recomputed_first() -> None:
    blocks = [*BLOCKS[:2], BlockCost("cheap", 100 * MIB, 10 * MIB, 0.01), BLOCKS[3]]
    choice = choose_treatment(blocks, 0, Rates(310 * MIB, 0.0, 0.0))
    assert choice.treatment == ("host", "host", "recompute", "host")


def test_a_block_whose_input_is_all_it_saves_is_not_recomputed() -> None:
    blocks = [BlockCost("relu", 10 * MIB, 10 * MIB, 0.1)]
    choice = choose_treatment(blocks, 0, Rates(0, 0.0, 0.0))
    assert choice.treatment == ("disk",)
    assert math.isinf(choice.seconds)


def test_what_cannot_fit_comes_as_close_as_can_be() -> None:
    choice = choose_treatment(BLOCKS, 50 * MIB, Rates(20 * MIB, 0.0, 0.0))
    assert choice.treatment == ("recompute",) * 4
    assert choice.disk_bytes == 70 * MIB
    assert math.isinf(choice.seconds)


def test_a_model_without_blocks_has_a_choice_too() -> None:
    choice = choose_treatment([], 10 * MIB, Rates(0, FAST, FAST))
    assert choice.treatment == ()
    assert choice.disk_bytes == 10 * MIB


@pytest.mark.parametrize(
    ("mode", "model_bytes", "share"),
    [
        ("disk", 0, 256 * MIB),
        ("host", 0, 512 * MIB),
        ("recompute", 900 * MIB, 124 * MIB),
        ("disk", 1023 * MIB, LEAST_BYTES),
        ("disk", 2048 * MIB, LEAST_BYTES),
    ],
)
def test_the_share_of_the_budget_leaves_the_model_what_it_needs(
    mode: str, model_bytes: int, share: int
) -> None:
    assert activation_share(mode, 1024 * MIB, model_bytes) == share


@pytest.mark.parametrize("budget", [44 * MIB, 60 * MIB, 150 * MIB, 1000 * MIB])
def test_the_plan_keeps_activations_within_the_budget(budget: int) -> None:
    units = [UnitSpec(f"u{i}", 4 * MIB, 4 * MIB) for i in range(8)]
    plan = place(units, budget, DiskSpec(), activation_bytes=16 * MIB)
    assert plan.activation_bytes == 16 * MIB
    assert plan.host_bytes()["activations"] == 16 * MIB
    assert sum(plan.host_bytes().values()) <= budget
    assert plan.pinned_bytes + plan.ring_bytes + plan.store_bytes + 16 * MIB <= budget
    assert plan.free_bytes >= 0


def test_a_budget_too_small_for_activations_names_the_smallest() -> None:
    units = [UnitSpec(f"u{i}", 4 * MIB, 4 * MIB) for i in range(8)]
    least = smallest_budget(units, DiskSpec()) + 16 * MIB
    place(units, least, DiskSpec(), activation_bytes=16 * MIB)
    with pytest.raises(BudgetError, match=f"is {least} bytes .* {16 * MIB} of them for activ"):
        place(units, least - 1, DiskSpec(), activation_bytes=16 * MIB)


def test_a_slow_link_makes_recomputing_worth_it() -> None:
    """Nothing goes to disk; 4 GB over 1 GB/s take as long as the compute of four forwards."""
    blocks = [BlockCost(f"b{i}", 10**9, 10**7, 0.25) for i in range(4)]
    near = Rates(room_bytes=10**10, read_bps=0.0, write_bps=0.0)
    assert set(choose_treatment(blocks, 0, near).treatment) == {"host"}
    slow = Rates(10**10, 0.0, 0.0, 0.0, to_host_bps=1e9, to_device_bps=1e9)
    choice = choose_treatment(blocks, 0, slow)
    assert choice.treatment.count("recompute") >= 2
    fast = Rates(10**10, 0.0, 0.0, 0.0, to_host_bps=25e9, to_device_bps=25e9)
    assert set(choose_treatment(blocks, 0, fast).treatment) == {"host"}
    assert choose_treatment(blocks, 0, fast).seconds == choose_treatment(blocks, 0, near).seconds
