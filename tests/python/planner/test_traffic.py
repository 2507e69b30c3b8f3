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


@pytest.mark.parametrize("lazy", [True, False])
def test_states_of_updates_on_a_device_stay_in_a_ring_that_holds_all(lazy: bool) -> None:
    plan = plan_of([SPILLED] * 5, 20 * UNIT)
    traffic = step_traffic(plan, lazy=lazy, on_device=range(5))
    assert traffic.read == 0
    assert traffic.written == (1 + 1 + 2) * UNIT * 5


def test_updates_on_a_device_leave_less_of_the_ring_to_parameters() -> None:
    """What passes during one: three results of the one before, four slabs, and the next one's."""
    count = 12
    plan = plan_of([SPILLED] * count, 10 * UNIT)
    there = step_traffic(plan, on_device=range(count))
    here = step_traffic(plan)
    assert there.written == here.written
    for_the_forward = 6 * UNIT  # both slabs of the first three units, of the five that stayed
    for_the_backward = 3 * UNIT  # the last three units' parameters, and their states for nothing
    assert there.read == 5 * UNIT * count - for_the_forward - for_the_backward
    assert here.read < there.read


def test_units_are_updated_where_they_are() -> None:
    plan = plan_of([SPILLED] * 6, 8 * UNIT)
    reads = [step_traffic(plan, on_device=range(count)).read for count in range(7)]
    assert reads[0] < reads[6]
    state = [2 * UNIT if i != 3 else 1001 for i in range(6)]  # an odd number of bytes
    traffic = step_traffic(plan, on_device=[3], state=state)
    assert traffic.written == 2 * UNIT * 6 + sum(state)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=8),
    st.integers(0, 20 * UNIT),
    st.integers(1, 3),
    st.booleans(),
    st.sets(st.integers(0, 7)),
)
def test_bounds(
    pins: list[tuple[bool, bool, bool]],
    ring: int,
    micro_batches: int,
    lazy: bool,
    on_device: set[int],
) -> None:
    plan = plan_of(pins, ring)
    params = UNIT * sum(not p for p, _, _ in pins)
    grads = UNIT * sum(not g for _, g, _ in pins)
    state = 2 * UNIT * sum(not s for _, _, s in pins)
    found = step_traffic(plan, micro_batches, lazy=lazy, on_device=on_device)
    assert found.written == micro_batches * grads + params + state
    extra = 0 if lazy else params
    unmoved = 2 * UNIT * sum(not s for i, (_, _, s) in enumerate(pins) if i not in on_device)
    assert unmoved <= found.read <= micro_batches * (2 * params + grads) + extra + state
