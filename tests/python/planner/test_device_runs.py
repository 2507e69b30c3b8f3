"""device_runs(): against every way there is, and what holds for any model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import PolicyError
from offload.planner import device_runs


def loads(nbytes: list[int], found: tuple[int, ...], devices: int) -> list[int]:
    return [sum(n for n, d in zip(nbytes, found, strict=True) if d == k) for k in range(devices)]


def every_way(count: int, runs: int) -> list[tuple[int, ...]]:
    """Each assignment of so many groups to contiguous runs, none of them empty."""
    ways = []
    for cuts in itertools.combinations(range(1, count), runs - 1):
        ways.append(tuple(sum(cut <= i for cut in cuts) for i in range(count)))
    return ways


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=400, deadline=None)
def test_it_is_the_best_of_all_ways(nbytes: list[int], devices: int) -> None:
    found = device_runs(nbytes, range(len(nbytes)), devices)
    used = min(devices, len(nbytes))

    def cost(way: tuple[int, ...]) -> tuple[int, int]:
        held = loads(nbytes, way, used)
        return max(held), sum(n * n for n in held)

    assert sorted(set(found)) == list(range(used))
    assert list(found) == sorted(found)
    assert cost(found) == min(map(cost, every_way(len(nbytes), used)))


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 5)), max_size=20), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_a_group_is_on_one_device(units: list[tuple[int, int]], devices: int) -> None:
    groups = [group for _, group in units]
    found = device_runs([n for n, _ in units], groups, devices)
    of_group = dict(zip(groups, found, strict=True))
    assert all(of_group[g] == d for g, d in zip(groups, found, strict=True))
    firsts = [of_group[g] for g in dict.fromkeys(groups)]
    assert firsts == sorted(firsts)
    assert set(found) == set(range(min(devices, len(of_group))))


def test_tied_weights_count_where_they_are_first() -> None:
    """An embedding of 40, four blocks of 20 and a head of the embedding's group that adds 4."""
    sizes, groups = [40, 20, 20, 20, 20, 4], ["embed", 0, 1, 2, 3, "embed"]
    assert device_runs(sizes, groups, 2) == (0, 0, 1, 1, 1, 0)


def test_a_large_model_is_quick() -> None:
    found = device_runs([1000 + i % 7 for i in range(400)], range(400), 8)
    held = loads([1000 + i % 7 for i in range(400)], found, 8)
    assert max(held) - min(held) < 3000


def test_no_device_is_refused() -> None:
    with pytest.raises(PolicyError, match="0 devices"):
        device_runs([1], [0], 0)
    assert device_runs([], [], 3) == ()
