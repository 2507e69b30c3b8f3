"""step_traffic: the bytes of a step, against counts by hand and bounds that hold for any plan."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.planner import Placement, Plan, UnitSpec, step_traffic

UNIT = 1000


def plan_of(pins: Sequence[tuple[bool, bool, bool]], ring: int) -> Plan:
    placements = tuple(
        Placement(UnitSpec(f"unit {i}", UNIT, UNIT), *pinned) for i, pinned in enumerate(pins)
    )
    return Plan(0, 0, 0, ring, placements)


SPILLED = (False, False, False)
PINNED = (True, True, True)


def test_pinned_plan_moves_nothing() -> None:
    traffic = step_traffic(plan_of([PINNED, PINNED], 0), 4)
    assert traffic.read == traffic.written == 0


def test_lazy_bytes_per_parameter_are_20_and_16() -> None:
    """Parameters for forward and backward, gradients and moments for the update."""
    count = 50
    traffic = step_traffic(plan_of([SPILLED] * count, 2 * UNIT))
    at_the_turns = 3 * UNIT  # the last unit's parameters, both slabs of the first one
    assert traffic.read == 5 * UNIT * count - at_the_turns
    assert traffic.written == 4 * UNIT * count


def test_eager_step_reads_parameters_once_more() -> None:
    count = 50
    plan = plan_of([SPILLED] * count, 2 * UNIT)
    at_the_turns = 4 * UNIT  # and the first unit's parameters again, for the forward
    assert step_traffic(plan, lazy=False).read == 6 * UNIT * count - at_the_turns
    assert step_traffic(plan, lazy=False).written == 4 * UNIT * count


@pytest.mark.parametrize("lazy", [True, False])
def test_a_ring_that_holds_all_reads_only_state(lazy: bool) -> None:
    plan = plan_of([SPILLED] * 5, 20 * UNIT)
    assert step_traffic(plan, 3, lazy=lazy).read == 2 * UNIT * 5
    assert step_traffic(plan, 3, lazy=lazy).written == (3 + 1 + 2) * UNIT * 5


def test_accumulation_reads_what_it_adds_to() -> None:
    plan = plan_of([(True, False, True)] * 10, UNIT)
    kept = UNIT  # the first unit's, from the second backward to the update
    assert step_traffic(plan, 2).read == 2 * UNIT * 10 - kept
    assert step_traffic(plan, 2).written == 2 * UNIT * 10


def test_recorded_uses_replace_the_assumed_ones() -> None:
    """A unit used twice in each forward, with no room to keep it."""
    plan = plan_of([(False, True, True)] * 3, UNIT)
    uses = [(0, False), (1, False), (0, False), (2, False), (2, True), (1, True), (0, True)]
    once = step_traffic(plan)
    again = step_traffic(plan, uses=uses)
    assert again.read - once.read == UNIT
    assert again.written == once.written


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=8),
    st.integers(0, 20 * UNIT),
    st.integers(1, 3),
    st.booleans(),
)
def test_bounds(
    pins: list[tuple[bool, bool, bool]], ring: int, micro_batches: int, lazy: bool
) -> None:
    plan = plan_of(pins, ring)
    params = UNIT * sum(not p for p, _, _ in pins)
    grads = UNIT * sum(not g for _, g, _ in pins)
    state = 2 * UNIT * sum(not s for _, _, s in pins)
    found = step_traffic(plan, micro_batches, lazy=lazy)
    assert found.written == micro_batches * grads + params + state
    extra = 0 if lazy else params
    assert state <= found.read <= micro_batches * (2 * params + grads) + extra + state
