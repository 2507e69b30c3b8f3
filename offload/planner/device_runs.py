"""Which unit goes to which device: pure functions.

Units that must be together (those of one block, those that share weights) are a group. In the order
of their first units, groups go to the devices in contiguous runs, so that a pass goes from one
device to the next as few times as there are devices. Of all ways the one is taken whose fullest
device holds the fewest bytes; of these, the one with the least sum of squares, so that no device is
left with next to nothing. Both are found exactly, by dynamic programming over where runs end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from offload.errors import PolicyError


def device_runs(nbytes: Sequence[int], groups: Sequence[Hashable], devices: int) -> tuple[int, ...]:
    """Return the device of each unit: 0, 1, ... Where there are fewer groups, so many devices.

    Args:
        nbytes: of each unit, in the order of their use.
        groups: of each unit, the group that it belongs to.
        devices: how many there are.

    Raises:
        PolicyError: there is no device.
    """
    if devices < 1:
        raise PolicyError(f"{devices} devices cannot hold anything")
    weights: dict[Hashable, int] = {}
    for size, group in zip(nbytes, groups, strict=True):
        weights[group] = weights.get(group, 0) + size
    ends = _ends(list(weights.values()), min(devices, len(weights)))
    of_group = {}
    for position, group in enumerate(weights):
        of_group[group] = sum(end <= position for end in ends)
    return tuple(of_group[group] for group in groups)


def _ends(weights: Sequence[int], runs: int) -> list[int]:
    """Return where each of `runs` runs, none of them empty, ends."""
    if runs == 0:
        return []
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    limit = _least_limit(weights, runs)
    count = len(weights)
    # best[i]: the least sum of squares of the first i weights in so many runs, and the last begin.
    best: list[tuple[int, int] | None] = [(0, 0)] + [None] * count
    begins: list[list[int]] = []
    for _ in range(runs):
        longer: list[tuple[int, int] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            for begin in range(end - 1, -1, -1):
                run = sums[end] - sums[begin]
                if run > limit:
                    break
                before = best[begin]
                if before is not None:
                    now = longer[end]
                    total = before[0] + run * run
                    if now is None or total < now[0]:
                        longer[end] = (total, begin)
        begins.append([0 if cell is None else cell[1] for cell in longer])
        best = longer
    ends, end = [count], count
    for row in reversed(begins[1:]):
        end = row[end]
        ends.insert(0, end)
    return ends


def _least_limit(weights: Sequence[int], runs: int) -> int:
    """Return the least number that the weights of none of `runs` contiguous runs exceed."""
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        needed, load = 1, 0
        for weight in weights:
            load += weight
            if load > middle:
                needed, load = needed + 1, weight
        low, high = (low, middle) if needed <= runs else (middle + 1, high)
    return low
