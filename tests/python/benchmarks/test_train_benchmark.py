"""What benchmarks/train.py makes of the runs' numbers."""

from __future__ import annotations

import pytest
import train

RUN = {
    "step_seconds": [100.0, 1.0, 3.0],
    "optimizer_seconds": [50.0, 0.01, 0.03],
    "step_read_bytes": [7, 98, 104],
    "step_write_bytes": [7, 0, 0],
    "foreseen_read_bytes": 100,
    "foreseen_write_bytes": 0,
}


def test_the_share_of_the_optimizer_leaves_the_first_steps_out() -> None:
    assert train.optimizer_share([RUN, RUN], 1) == pytest.approx(0.01)


def test_traffic_is_compared_with_what_was_foreseen() -> None:
    assert train.traffic_error([RUN], 1, "read") == pytest.approx(0.01)
    assert train.traffic_error([RUN], 1, "write") == 0.0
    assert train.traffic_error([{**RUN, "step_write_bytes": [0, 5, 5]}], 1, "write") == 1.0
