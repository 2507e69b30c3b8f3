"""AccessTrace: what it predicts for the shapes that training programs have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.trace import AccessTrace, Phase, Use


def forward(units: Sequence[int]) -> list[Use]:
    return [Use(unit, Phase.FORWARD) for unit in units]


def backward(units: Sequence[int]) -> list[Use]:
    return [Use(unit, Phase.BACKWARD) for unit in reversed(units)]


def micro_batch(units: Sequence[int]) -> list[Use]:
    return forward(units) + backward(units)


def record(trace: AccessTrace, uses: Sequence[Use]) -> None:
    for use in uses:
        trace.record(use)


def assert_foreseen(trace: AccessTrace, uses: Sequence[Use]) -> None:
    """Record `uses`, each of which, and all that follow it, must have been predicted."""
    for i, use in enumerate(uses):
        assert list(trace.future(len(uses) - i)) == list(uses[i:])
        trace.record(use)


def test_nothing_is_predicted_before_anything_repeats() -> None:
    trace = AccessTrace()
    assert list(trace.future(5)) == []
    record(trace, micro_batch(range(4)))
    assert list(trace.future(5)) == []
    assert (trace.recorded, trace.mispredicted) == (8, 0)


def test_limit() -> None:
    trace = AccessTrace()
    record(trace, micro_batch(range(4)) * 2)
    assert list(trace.future(0)) == []
    assert len(list(trace.future(3))) == 3
    assert list(trace.future(20)) == (micro_batch(range(4)) * 3)[:20]


def test_micro_batches_are_foreseen_from_the_second_on() -> None:
    trace = AccessTrace()
    one = micro_batch(range(5))
    record(trace, one)
    trace.record(one[0])
    assert list(trace.future(9)) == one[1:]
    record(trace, one[1:])
    assert_foreseen(trace, one * 6)
    assert trace.mispredicted == 0


@pytest.mark.parametrize(
    "units",
    [[0], [0, 1, 2, 0], [0, 0, 1, 1, 1, 2], [0, 1, 0, 1, 2], [3, 1, 2, 3, 1, 0, 3]],
    ids=["alone", "tied", "repeated", "twice", "mixed"],
)
def test_repeated_units(units: list[int]) -> None:
    """Tied embeddings and weight-shared layers: once a few passes are on record, all is known."""
    trace = AccessTrace()
    one = micro_batch(units)
    record(trace, one * 3)
    before = trace.mispredicted
    assert_foreseen(trace, one * 4)
    assert trace.mispredicted == before


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_order_settles(units: list[int]) -> None:
    """Whatever repeats is foreseen after a number of passes that depends on its length only."""
    trace = AccessTrace()
    one = micro_batch(units)
    record(trace, one * (len(one) + 2))
    before = trace.mispredicted
    assert_foreseen(trace, one * 2)
    assert trace.mispredicted == before


def test_recomputation_in_backward() -> None:
    """Activation checkpointing: each unit's forward runs again just before its backward."""
    trace = AccessTrace()
    one = forward(range(4))
    for unit in reversed(range(4)):
        one += [Use(unit, Phase.FORWARD), Use(unit, Phase.BACKWARD)]
    record(trace, one * 3)
    before = trace.mispredicted
    assert_foreseen(trace, one * 3)
    assert trace.mispredicted == before


def test_interleaved_evaluation() -> None:
    """Nobody can foresee when evaluation begins and ends; a pass later all is foreseen again."""
    trace = AccessTrace()
    train, evaluate = micro_batch(range(6)), forward(range(6))
    record(trace, train * 3)
    assert trace.mispredicted == 0
    for _ in range(4):
        before = trace.mispredicted
        record(trace, evaluate * 3)
        assert_foreseen(trace, evaluate * 3)
        record(trace, train * 2)
        assert trace.mispredicted - before <= 5
        before = trace.mispredicted
        assert_foreseen(trace, train * 2)
        assert trace.mispredicted == before


def test_change_of_control_flow_is_counted_and_learned() -> None:
    trace = AccessTrace()
    old, new = micro_batch(range(6)), micro_batch([0, 1, 2, 4, 5])  # unit 3 is dropped
    record(trace, old * 3)
    assert trace.mispredicted == 0
    record(trace, new)
    assert trace.mispredicted == 2  # where 3 was expected, in forward and in backward
    record(trace, new)
    before = trace.mispredicted
    assert_foreseen(trace, new * 4)
    assert trace.mispredicted == before


def test_unit_that_was_never_seen() -> None:
    trace = AccessTrace()
    one = micro_batch(range(4))
    record(trace, one * 2)
    trace.record(Use(9, Phase.FORWARD))
    assert trace.mispredicted == 1
    assert list(trace.future(4)) == []
    record(trace, one * 3)
    assert trace.mispredicted <= 3  # it may be expected again after the next pass or two
    before = trace.mispredicted
    assert_foreseen(trace, one * 2)
    assert trace.mispredicted == before


@pytest.mark.parametrize("capacity", [64, 65, 100])
def test_trimming_keeps_predictions_right(capacity: int) -> None:
    trace = AccessTrace(capacity)
    one = micro_batch(range(7))
    record(trace, one * 2)
    assert_foreseen_in_passes(trace, one, passes=50)
    assert trace.recorded == 52 * len(one)
    assert trace.mispredicted == 0


def assert_foreseen_in_passes(trace: AccessTrace, one: list[Use], passes: int) -> None:
    for _ in range(passes):
        for i, use in enumerate(one):
            ahead = list(trace.future(2 * len(one)))
            assert ahead == (one * 3)[i : i + 2 * len(one)]
            trace.record(use)


def test_trimming_below_the_period_is_no_error() -> None:
    """A record too short for one pass predicts little, but never fails."""
    trace = AccessTrace(8)
    one = micro_batch(range(20))
    for use in one * 5:
        trace.record(use)
        assert len(list(trace.future(3))) in (0, 3)
    assert trace.recorded == 200


def test_memory_is_bounded() -> None:
    trace = AccessTrace(128)
    record(trace, micro_batch(range(5)) * 200)
    assert len(trace._history) <= 128
    assert max(trace._after_two.values()) < 128


def test_the_last_training_pass_is_found_behind_an_evaluation() -> None:
    trace = AccessTrace()
    assert trace.last_training_pass() is None
    for _ in range(3):
        trace.begin_pass()
        record(trace, micro_batch([0, 1, 2]))
    trace.begin_pass()
    record(trace, forward([0, 1, 2]))
    assert trace.last_training_pass() == micro_batch([0, 1, 2])
    trace.begin_pass()
    record(trace, micro_batch([2, 0]))
    assert trace.last_training_pass() == micro_batch([2, 0])


def test_a_pass_is_found_after_the_older_half_was_forgotten() -> None:
    trace = AccessTrace(capacity=20)
    for _ in range(9):
        trace.begin_pass()
        record(trace, micro_batch([0, 1, 2]))
    assert trace.last_training_pass() == micro_batch([0, 1, 2])


def test_the_end_of_a_step_is_foreseen_from_the_passes_of_the_one_before() -> None:
    trace = AccessTrace()
    uses = micro_batch(range(2))
    left = []
    for _ in range(3):
        for _ in range(2):
            trace.begin_pass()
            for use in uses:
                trace.record(use)
                left.append(trace.in_step(9))
        trace.end_step()
        assert trace.in_step(9) == 8  # the uses to come are of the step after
        assert trace.in_step(5) == 5
    assert left == [9] * 8 + [7, 6, 5, 4, 3, 2, 1, 0] * 2


def test_without_an_optimizer_no_step_ends() -> None:
    trace = AccessTrace()
    assert trace.in_step(5) == 5
    for _ in range(3):
        trace.begin_pass()
        record(trace, forward(range(3)))
        assert trace.in_step(5) == 5
