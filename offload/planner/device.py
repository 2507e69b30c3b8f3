"""The device's part of a plan: which slabs have a place of their own there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import BudgetError
from offload.planner.spec import UnitSpec


@dataclass(frozen=True)
class DevicePlan:
    """How a device budget is used.

    Attributes:
        home_bytes: for parameters and gradients of units that are in use while others come and go.
        ring_bytes: for the copies that come and go.
    """

    home_bytes: int
    ring_bytes: int


def smallest_device_budget(units: Sequence[UnitSpec]) -> int:
    """Return the least device budget in bytes with which `units` can be trained.

    Both slabs of the largest unit, and the larger of them once more, so that the next slab fits
    wherever one that is held lies; and all of the nested ones.
    """
    flat = [unit for unit in units if not unit.nested]
    params = max((unit.param_bytes for unit in flat), default=0)
    grads = max((unit.grad_bytes for unit in flat), default=0)
    return _home_bytes(units) + params + grads + max(params, grads)


def place_on_device(units: Sequence[UnitSpec], budget_bytes: int) -> DevicePlan:
    """Return how `budget_bytes` of device memory are used.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that would do.
    """
    least = smallest_device_budget(units)
    if budget_bytes < least:
        raise BudgetError(
            f"Budget(device={budget_bytes}) is too small for this model: the smallest device "
            f"budget that would do is {least} bytes ({least / 2**20:.1f} MiB)"
        )
    home = _home_bytes(units)
    return DevicePlan(home, budget_bytes - home)


def _home_bytes(units: Sequence[UnitSpec]) -> int:
    return sum(unit.param_bytes + unit.grad_bytes for unit in units if unit.nested)
