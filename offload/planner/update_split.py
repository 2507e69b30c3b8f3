"""Which units are updated on the CPU and which on the device: a pure function.

Both work at once, so the step's updates take as long as the slower of them; where there are several
devices, each unit has one that it may go to, and the slowest counts. A unit takes the CPU
its bytes at the CPU's rate. On the device the link to it, the link back and the kernel work at once
too, each on another unit, and the slowest of them counts. Assigning jobs to two machines such that
both end soonest is NP-hard (a partition); here each unit, in the order of the model, goes where it
ends sooner, which spreads both kinds evenly, and then single units change sides as long as that
helps. With costs in proportion the result is within the largest unit's cost of the best, and the
best where all units are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.planner.spec import UnitSpec


@dataclass(frozen=True)
class UpdateRates:
    """Bytes per second.

    Attributes:
        cpu: of parameters, gradients and states that the CPU updates, with all of its threads.
        kernel: of those that the device updates.
        to_device, to_host: of the link, each way.
    """

    cpu: float
    kernel: float
    to_device: float
    to_host: float


@dataclass(frozen=True)
class UpdateSplit:
    """Where units are updated.

    Attributes:
        on_device: indices of those on the device; the others are on the CPU.
        cpu_seconds, device_seconds: what a step's updates take there; on the slowest device.
    """

    on_device: frozenset[int]
    cpu_seconds: float
    device_seconds: float

    @property
    def seconds(self) -> float:
        """When both are done."""
        return max(self.cpu_seconds, self.device_seconds)


def update_seconds(unit: UnitSpec, rates: UpdateRates) -> tuple[float, float]:
    """Return what the update of `unit` takes on the CPU, and on the device.

    The parameters come to the device, and the gradients home, wherever the update runs.
    """
    touched = unit.param_bytes + unit.grad_bytes + unit.state_bytes
    device = max(
        (unit.grad_bytes + unit.state_bytes) / rates.to_device,
        (unit.param_bytes + unit.state_bytes) / rates.to_host,
        touched / rates.kernel,
    )
    return touched / rates.cpu, device


def split_updates(units: Sequence[UnitSpec], rates: Sequence[UpdateRates]) -> UpdateSplit:
    """Return which of `units` to update where, by the rule above. Frozen ones have no update.

    Args:
        units: all of the model.
        rates: of each device and its link; the CPU's rate is that of the first.
    """
    costs = {
        i: (
            update_seconds(unit, rates[0])[_CPU],
            update_seconds(unit, rates[unit.device])[1],
        )
        for i, unit in enumerate(units)
        if unit.grad_bytes
    }
    there = {i: 1 + units[i].device for i in costs}  # the side that is not the CPU
    side: dict[int, int] = {}
    load = [0.0] * (1 + len(rates))
    for i, (cpu, device) in costs.items():
        side[i] = there[i] if load[there[i]] + device < load[_CPU] + cpu else _CPU
        load[side[i]] += device if side[i] else cpu
    while True:
        slow = load.index(max(load))
        moves = []
        for i, (cpu, device) in costs.items():
            if side[i] != slow:
                continue
            leaves, joins = (device, cpu) if slow else (cpu, device)
            other = _CPU if slow else there[i]
            moves.append((max(load[slow] - leaves, load[other] + joins), i, other))
        best, moved, other = min(moves, default=(load[slow], -1, _CPU))
        if not best < load[slow]:
            break
        side[moved] = other
        load = [sum(costs[i][min(s, 1)] for i in costs if side[i] == s) for s in range(len(load))]
    on_device = frozenset(i for i in side if side[i] != _CPU)
    return UpdateSplit(on_device, load[_CPU], max(load[1:]))


_CPU = 0
"""The side of the CPU; those of the devices follow."""
