"""Which units are updated on the CPU and which on the device: a pure function.

The two work at once, so the step's updates take as long as the slower of them. A unit takes the CPU
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
        cpu_seconds, device_seconds: what a step's updates take there.
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


def split_updates(units: Sequence[UnitSpec], rates: UpdateRates) -> UpdateSplit:
    """Return which of `units` to update where, by the rule above. Frozen ones have no update."""
    costs = {i: update_seconds(u, rates) for i, u in enumerate(units) if u.grad_bytes}
    side: dict[int, int] = {}  # 0: the CPU, 1: the device
    load = [0.0, 0.0]
    for i, cost in costs.items():
        side[i] = int(load[1] + cost[1] < load[0] + cost[0])
        load[side[i]] += cost[side[i]]
    while True:
        slow = int(load[1] > load[0])
        moves = [
            (max(load[slow] - costs[i][slow], load[1 - slow] + costs[i][1 - slow]), i)
            for i in costs
            if side[i] == slow
        ]
        best, moved = min(moves, default=(load[slow], -1))
        if not best < load[slow]:
            break
        side[moved] = 1 - slow
        load = [sum(costs[i][s] for i in costs if side[i] == s) for s in (0, 1)]
    return UpdateSplit(frozenset(i for i in side if side[i] == 1), load[0], load[1])
