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
        updates: whether there is room for updates on the device.
    """

    home_bytes: int
    ring_bytes: int
    updates: bool = False


def smallest_device_budget(units: Sequence[UnitSpec], updates: bool = False) -> int:
    """Return the least device budget in bytes with which `units` can be trained.

    Both slabs of the largest unit, and the larger of them once more, so that the next slab fits
    wherever one that is held lies; and all of the nested ones. With `updates` on the device, all
    that one of them uses, and the largest slab twice more: parameters and gradients may be held
    while the states come. A frozen unit may be held besides, and there is one gap more.
    """
    flat = [unit for unit in units if not unit.nested]
    params = max((unit.param_bytes for unit in flat), default=0)
    grads = max((unit.grad_bytes for unit in flat), default=0)
    ring = params + grads + max(params, grads)
    if updates:
        used = max((_update_bytes(unit) for unit in units), default=0)
        state = max((unit.state_slab_bytes for unit in units), default=0)
        frozen = any(unit.grad_bytes == 0 for unit in flat)
        ring = max(ring, used + (4 if frozen else 2) * max(params, grads, state))
    return _home_bytes(units) + ring


def place_on_device(
    units: Sequence[UnitSpec], budget_bytes: int, updates: bool = False, name: str = ""
) -> DevicePlan:
    """Return how `budget_bytes` of device memory are used.

    Args:
        units: all units of the model that are used there.
        budget_bytes: of device memory.
        updates: there is to be room for updates on the device.
        name: of the device, where there are several.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that would do.
    """
    least = smallest_device_budget(units, updates)
    if budget_bytes < least:
        what = f"for what {name} has of this model" if name else "for this model"
        what += " with its updates on the device" if updates else ""
        raise BudgetError(
            f"Budget(device={budget_bytes}) is too small {what}: the smallest device "
            f"budget that would do is {least} bytes ({least / 2**20:.1f} MiB)"
        )
    home = _home_bytes(units)
    return DevicePlan(home, budget_bytes - home, updates)


def _update_bytes(unit: UnitSpec) -> int:
    """What the update of `unit` uses of the ring."""
    if unit.grad_bytes == 0:
        return 0
    values = 0 if unit.nested else unit.param_bytes + unit.grad_bytes
    return values + unit.state_bytes


def _home_bytes(units: Sequence[UnitSpec]) -> int:
    return sum(unit.param_bytes + unit.grad_bytes for unit in units if unit.nested)
