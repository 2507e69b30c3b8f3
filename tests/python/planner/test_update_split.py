"""split_updates(): against every assignment there is."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from offload.planner import UnitSpec, UpdateRates, UpdateSplit, split_updates
from offload.planner.update_split import update_seconds

RATE = st.floats(1e8, 1e12)
RATES = st.builds(UpdateRates, cpu=RATE, kernel=RATE, to_device=RATE, to_host=RATE)


def unit(pages: int, trained: bool = True) -> UnitSpec:
    return UnitSpec("unit", 4096 * pages, 4096 * pages if trained else 0)


def best(units: list[UnitSpec], rates: UpdateRates) -> float:
    costs = [update_seconds(u, rates) for u in units if u.grad_bytes]
    return min(
        max(sum(c[s] for c, s in zip(costs, sides, strict=True) if s == k) for k in (0, 1))
        for sides in itertools.product((0, 1), repeat=len(costs))
    )


def check(split: UpdateSplit, units: list[UnitSpec], rates: UpdateRates) -> None:
    costs = [update_seconds(u, rates) if u.grad_bytes else (0.0, 0.0) for u in units]
    cpu = sum(c[0] for i, c in enumerate(costs) if i not in split.on_device)
    device = sum(c[1] for i, c in enumerate(costs) if i in split.on_device)
    assert abs(split.cpu_seconds - cpu) <= 1e-9 * cpu
    assert abs(split.device_seconds - device) <= 1e-9 * device
    assert all(units[i].grad_bytes for i in split.on_device)


@given(st.lists(st.tuples(st.integers(1, 2000), st.booleans()), max_size=9), RATES)
@settings(max_examples=300, deadline=None)
def test_it_is_within_the_largest_unit_of_the_best(
    sizes: list[tuple[int, bool]], rates: UpdateRates
) -> None:
    units = [unit(*size) for size in sizes]
    split = split_updates(units, [rates])
    check(split, units, rates)
    costs = [update_seconds(u, rates) for u in units if u.grad_bytes]
    slack = max((max(c) for c in costs), default=0.0)
    assert split.seconds <= (best(units, rates) + slack) * (1 + 1e-9)
    for alone in (0, 1):
        assert split.seconds <= sum(c[alone] for c in costs) * (1 + 1e-9)


@given(st.integers(0, 9), st.integers(1, 1000), RATES)
@settings(max_examples=200, deadline=None)
def test_units_alike_are_split_the_best_way(count: int, pages: int, rates: UpdateRates) -> None:
    units = [unit(pages)] * count
    split = split_updates(units, [rates])
    check(split, units, rates)
    assert split.seconds <= best(units, rates) * (1 + 1e-9)


def test_both_kinds_are_spread_evenly() -> None:
    rates = UpdateRates(cpu=1e9, kernel=1e12, to_device=0.75e9, to_host=0.75e9)
    on_device = split_updates([unit(10)] * 12, [rates]).on_device
    assert len(on_device) == 6
    assert all(1 <= len(on_device & {i, i + 1, i + 2}) <= 2 for i in range(10))
