"""Activations: how much of the budget is theirs, and which blocks are recomputed.

The rule of ``Policy(activations="auto")``. Activations are saved in the order of the forward and
needed in the reverse order, so those saved last are the ones to hold in memory: of all saved bytes
the last ``room_bytes`` stay, and the rest is written in the forward and read in the backward. With
F the seconds of the forward's compute (the backward's are taken to be 2 F), C those of the blocks
that are recomputed, S the bytes on disk and D the seconds that the disk is busy with parameters,
gradients and state (a third of them in the forward), a step takes about

    max(F, S / write rate + D / 3)  +  max(2 F + C, S / read rate + 2 D / 3).

On a device apart all A bytes that are saved go over the link to the host and come back, so that
A / its rate each way is one more term of either maximum.

Blocks are recomputed in the order of the bytes that a second of recomputing saves, as many as make
that shortest; of equals, the fewest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_BYTES = 4 << 20
"""What activations get at the least: a budget without room for that is refused."""


@dataclass(frozen=True)
class BlockCost:
    """What a block costs in one forward.

    Attributes:
        name: for messages.
        saved_bytes: that the backward needs of it.
        input_bytes: of its inputs, which are all that is saved when it is recomputed.
        seconds: of its forward, without waiting for transfers.
    """

    name: str
    saved_bytes: int
    input_bytes: int
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What a step has at its disposal.

    Attributes:
        room_bytes: of host memory for activations.
        read_bps, write_bps: of the disk, bytes per second; 0: there is none.
        busy_seconds: that the disk is busy with other things in a step.
        to_host_bps, to_device_bps: of the link to the device; 0: there is none to cross.
    """

    room_bytes: int
    read_bps: float
    write_bps: float
    busy_seconds: float = 0.0
    to_host_bps: float = 0.0
    to_device_bps: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What to do with the blocks of a model.

    Attributes:
        treatment: of each block: "recompute", "disk" or "host". Of one that lies partly on disk
            "disk".
        disk_bytes: that a step writes and reads.
        seconds: what a step is estimated to take; infinite where it does not fit at all.
    """

    treatment: tuple[str, ...]
    disk_bytes: int
    seconds: float


def activation_share(mode: str, budget_bytes: int, model_bytes: int) -> int:
    """Return the part of the host budget for activations where the user named none.

    Args:
        mode: ``Policy.activations``.
        budget_bytes: the host budget.
        model_bytes: the least that the model needs of it.
    """
    share = budget_bytes // 2 if mode == "host" else budget_bytes // 4
    return max(LEAST_BYTES, min(share, budget_bytes - model_bytes))


def choose_treatment(blocks: Sequence[BlockCost], other_bytes: int, rates: Rates) -> Choice:
    """Return which blocks to recompute, by the rule above.

    Args:
        blocks: in the order of the forward.
        other_bytes: saved outside of the blocks.
        rates: of the machine.
    """
    gain = [max(0, b.saved_bytes - b.input_bytes) for b in blocks]
    order = sorted(
        (i for i in range(len(blocks)) if gain[i] > 0),
        key=lambda i: (-gain[i] / max(blocks[i].seconds, 1e-9), i),
    )
    best: Choice | None = None
    for count in range(len(order) + 1):
        choice = _evaluate(blocks, other_bytes, rates, frozenset(order[:count]))
        if best is None or choice.seconds < best.seconds:
            best = choice
        elif math.isinf(best.seconds) and choice.disk_bytes < best.disk_bytes:
            best = choice  # nothing fits: come as close as can be
    if best is None:
        raise ValueError("no choice was evaluated")
    return best


def _evaluate(
    blocks: Sequence[BlockCost], other_bytes: int, rates: Rates, recomputed: frozenset[int]
) -> Choice:
    saved = [b.input_bytes if i in recomputed else b.saved_bytes for i, b in enumerate(blocks)]
    moved = sum(saved) + other_bytes
    on_disk = max(0, moved - rates.room_bytes)
    away = moved / rates.to_host_bps if rates.to_host_bps else 0.0
    back = moved / rates.to_device_bps if rates.to_device_bps else 0.0
    forward = sum(b.seconds for b in blocks)
    again = sum(blocks[i].seconds for i in recomputed)
    seconds = max(forward, _time(on_disk, rates.write_bps) + rates.busy_seconds / 3, away) + max(
        2 * forward + again, _time(on_disk, rates.read_bps) + rates.busy_seconds * 2 / 3, back
    )
    treatment = []
    before = 0  # bytes saved before this block: the first ones are those on disk
    for i, nbytes in enumerate(saved):
        place = "disk" if before < on_disk else "host"
        treatment.append("recompute" if i in recomputed else place)
        before += nbytes
    return Choice(tuple(treatment), on_disk, seconds)


def _time(nbytes: int, rate: float) -> float:
    if nbytes == 0:
        return 0.0
    return nbytes / rate if rate > 0 else math.inf
