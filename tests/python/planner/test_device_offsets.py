"""Planned offsets in device memory: no overlap, and little more memory than is alive at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import PolicyError
from offload.planner.device_offsets import (
    LEASE_BYTES,
    Lifetime,
    device_offsets,
    least_bytes,
    rounded,
)

lifetimes = st.lists(
    st.builds(
        lambda nbytes, first, length: Lifetime(nbytes, first, first + length),
        st.integers(1, 20 * LEASE_BYTES),
        st.integers(0, 40),
        st.integers(0, 15),
    ),
    max_size=40,
)


def check(lives: list[Lifetime]) -> int:
    plan = device_offsets(lives)
    for i, (a, at) in enumerate(zip(lives, plan.offsets, strict=True)):
        assert at % LEASE_BYTES == 0
        assert 0 <= at <= plan.nbytes - rounded(a.nbytes)
        for b, other in zip(lives[:i], plan.offsets[:i], strict=True):
            together = a.first <= b.last and b.first <= a.last
            apart = at + rounded(a.nbytes) <= other or other + rounded(b.nbytes) <= at
            assert apart or not together
    assert plan.nbytes >= least_bytes(lives)
    return plan.nbytes


@given(lifetimes)
def test_slabs_that_are_alive_together_share_no_byte(lives: list[Lifetime]) -> None:
    check(lives)


@given(lifetimes)
def test_the_bound_is_what_is_alive_at_the_worst_moment(lives: list[Lifetime]) -> None:
    at = (sum(rounded(x.nbytes) for x in lives if x.first <= t <= x.last) for t in range(60))
    assert least_bytes(lives) == max(at)


def step(sizes: list[int], ahead: int) -> list[Lifetime]:
    """A forward and a backward over units: parameters fetched `ahead` uses early, twice.

    Gradients live in the backward only, until one use after their own.
    """
    units = len(sizes)
    uses = [*range(units), *reversed(range(units))]
    lives = [Lifetime(sizes[u], max(0, t - ahead), t) for t, u in enumerate(uses)]
    return lives + [Lifetime(sizes[u], t, t + 1) for t, u in enumerate(uses) if t >= units]


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_alike_blocks_need_the_least_there_is(ahead: int) -> None:
    lives = step([7 << 20] * 24, ahead)
    assert check(lives) == least_bytes(lives)


@pytest.mark.parametrize("seed", range(20))
def test_realistic_traces_need_at_most_a_fifth_more(seed: int) -> None:
    rng = random.Random(seed)
    block = rng.randint(1 << 20, 20 << 20)
    sizes = [rng.choice([block, block, block, 4 * block, block // 3]) for _ in range(32)]
    lives = step(sizes, rng.randint(1, 5))
    assert check(lives) <= 1.2 * least_bytes(lives)


def test_nothing_needs_nothing() -> None:
    assert device_offsets([]).nbytes == 0


@pytest.mark.parametrize("life", [Lifetime(0, 0, 1), Lifetime(1, 2, 1)])
def test_what_cannot_be_is_refused(life: Lifetime) -> None:
    with pytest.raises(PolicyError, match="slab 1"):
        device_offsets([Lifetime(1, 0, 0), life])
