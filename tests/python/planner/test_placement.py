"""place(): properties that hold for any model and any budget."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner import DiskSpec, Plan, UnitSpec, place, smallest_budget
from offload.planner.placement import LEAST_STAGING_BLOCKS, SMALL_BYTES

PAGE = 4096
MIB = 2**20


@st.composite
def unit_specs(draw: st.DrawFn) -> list[UnitSpec]:
    """Models of 1 to 12 units, alike or not, some frozen in part or whole, some nested.

    Some of the frozen ones are kept in 16 bits beside their fp32 values, or lie in files.
    """
    scales = draw(st.sampled_from([[PAGE], [64 * PAGE], [MIB], [16 * MIB], [PAGE, MIB, 9 * MIB]]))
    units = []
    for i in range(draw(st.integers(1, 12))):
        params = draw(st.integers(1, 12)) * draw(st.sampled_from(scales))
        grads = draw(st.sampled_from([params, params, 0, params // 2 // PAGE * PAGE]))
        nested = draw(st.sampled_from([False, False, False, True]))
        masters: tuple[int, ...] = ()
        if grads == 0 and draw(st.booleans()):
            first = 2 * draw(st.integers(1, params // PAGE)) * PAGE
            masters = tuple(n for n in (first, 2 * params - first) if n)
        in_file = grads == 0 and not masters and draw(st.booleans())
        units.append(
            UnitSpec(f"unit{i}", params, grads, nested, frozen_masters=masters, in_file=in_file)
        )
    return units


def everything(units: list[UnitSpec]) -> int:
    return sum(u.param_bytes + 3 * u.grad_bytes + sum(u.frozen_masters) for u in units)


def draw_budget(data: st.DataObject, units: list[UnitSpec]) -> int:
    least = smallest_budget(units, disk=DiskSpec())
    return data.draw(st.integers(least, everything(units) + 64 * MIB), label="budget")


def on_disk(plan: Plan) -> int:
    return sum(plan.disk_bytes().values())


def is_kept(unit: UnitSpec) -> bool:
    """Never spilled: in use while others come and go, or not worth a transfer."""
    return unit.nested or unit.param_bytes <= SMALL_BYTES


def check(plan: Plan, units: list[UnitSpec], budget: int) -> None:
    """What every plan must be."""
    assert plan.budget_bytes == budget
    assert sum(plan.host_bytes().values()) <= budget
    assert plan.pinned_bytes + plan.ring_bytes <= budget
    assert [p.unit for p in plan.placements] == units
    host, disk = plan.host_bytes(), plan.disk_bytes()
    assert host.keys() == disk.keys()
    assert host["parameters"] + disk["parameters"] == sum(u.param_bytes for u in units)
    assert host["gradients"] + disk["gradients"] == sum(u.grad_bytes for u in units)
    state = sum(2 * u.grad_bytes + sum(u.frozen_masters) for u in units)
    assert host["optimizer state"] + disk["optimizer state"] == state
    assert plan.spills == (on_disk(plan) > 0)
    for placement in plan.placements:
        if is_kept(placement.unit):
            assert placement.pin_params
            assert placement.pin_grads
            assert placement.pin_state or placement.unit.frozen_masters
    for placement in plan.placements if plan.spills else ():
        if placement.unit.frozen_masters:  # out of the way of what is in use
            assert placement.pin_state == (placement.unit.param_bytes <= SMALL_BYTES)
        if not placement.pin_state:
            assert plan.ring_bytes >= max(placement.unit.frozen_masters, default=0)
    in_files = sum(p.unit.param_bytes for p in plan.placements if p.in_file)
    assert plan.swap_bytes == on_disk(plan) - in_files
    flat = [p for p in plan.placements if not is_kept(p.unit)]
    params = max((p.unit.param_bytes for p in flat), default=0)
    grads = max((p.unit.grad_bytes for p in flat), default=0)
    if not all(p.pin_params and p.pin_grads for p in flat):
        assert plan.ring_bytes >= params + grads + max(params, grads), "deadlock by fragmentation"
    if not all(p.pin_state for p in plan.placements):
        assert plan.staging_bytes >= LEAST_STAGING_BLOCKS * DiskSpec().block_bytes
        assert plan.staging_bytes % DiskSpec().block_bytes == 0
        # The moments of any unit can be read out whole, for a state_dict.
        assert plan.ring_bytes >= max(p.unit.grad_bytes for p in plan.placements if not p.pin_state)


@given(unit_specs(), st.data())
@settings(max_examples=400, deadline=None)
def test_any_budget(units: list[UnitSpec], data: st.DataObject) -> None:
    budget = draw_budget(data, units)
    check(place(units, budget, disk=DiskSpec()), units, budget)


@given(unit_specs(), st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_more_than_enough_pins_everything(units: list[UnitSpec], more: int) -> None:
    budget = everything(units) + more
    for disk in (None, DiskSpec()):
        plan = place(units, budget, disk)
        check(plan, units, budget)
        assert not plan.spills
        assert plan.ring_bytes == plan.staging_bytes == 0


@given(unit_specs(), st.sampled_from([None, DiskSpec()]), st.integers(1, 16 * PAGE))
@settings(max_examples=200, deadline=None)
def test_smallest_budget_is_the_smallest(
    units: list[UnitSpec], disk: DiskSpec | None, less: int
) -> None:
    least = smallest_budget(units, disk)
    check(place(units, least, disk), units, least)
    hint = "swap_dir" if disk is None else ""
    for budget in (least - 1, least - PAGE, least - less, 0):
        with pytest.raises(BudgetError, match=rf"{hint}.*\b{least} bytes") as caught:
            place(units, budget, disk)
        assert f"Budget(host={budget})" in str(caught.value)


@given(unit_specs())
@settings(deadline=None)
def test_without_swap_everything_must_be_pinned(units: list[UnitSpec]) -> None:
    assert smallest_budget(units, disk=None) == everything(units)
    assert smallest_budget(units, disk=DiskSpec()) <= everything(units)


@given(unit_specs(), st.data())
@settings(max_examples=400, deadline=None)
def test_more_memory_does_not_spill_more(units: list[UnitSpec], data: st.DataObject) -> None:
    """Slabs are whole, so within the largest unit and the staging that the budget adds."""
    budgets = sorted((draw_budget(data, units), draw_budget(data, units)))
    small, large = (place(units, budget, disk=DiskSpec()) for budget in budgets)
    slab = max(u.param_bytes + 3 * u.grad_bytes for u in units)
    staging = max(0, large.staging_bytes - small.staging_bytes)
    assert on_disk(large) <= on_disk(small) + slab + staging


@given(unit_specs(), st.data())
@settings(max_examples=200, deadline=None)
def test_state_leaves_memory_first(units: list[UnitSpec], data: st.DataObject) -> None:
    """A byte of state costs less traffic than one of parameters or gradients."""
    plan = place(units, draw_budget(data, units), disk=DiskSpec())
    flat = [p for p in plan.placements if not is_kept(p.unit)]
    assume(any(p.pin_state and p.unit.grad_bytes for p in flat))
    assert all(p.pin_params and p.pin_grads for p in flat)


def test_no_units() -> None:
    plan = place([], 1, disk=None)
    assert plan.placements == ()
    assert not plan.spills
