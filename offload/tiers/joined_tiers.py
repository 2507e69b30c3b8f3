"""Several devices with one host memory between them, as the Mover sees their copies from it.

Protocol of host memory that copies of several devices use:
 1. memory that a device reads is not given to anybody else, whichever device that is: is_reading()
    asks all, and end_one() waits for any.
 2. before a device starts a copy from or to host memory, the checkers of the others are told
    (DeviceTier.others): no stream of one device waits for a stream of another, so what the others
    do with that memory must be known by the host to be over.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload.tiers.device_tier import DeviceTier
from offload.tiers.eviction import Readers
from offload.tiers.slab import Arrival, Slab


class JoinedTiers:
    """Copies from host memory to any of several devices."""

    def __init__(self, tiers: Sequence[DeviceTier]) -> None:
        """Join `tiers`, which use one Mover."""
        self._tiers = tiers

    def settle(self, slab: Slab) -> None:
        """Wait until no copy from `slab` is in flight: its bytes may be changed."""
        for tier in self._tiers:
            tier.settle(slab)

    def in_flight(self, slab: Slab) -> list[Arrival]:
        """Return the copies from `slab` in flight, for a native job to follow."""
        return [copy for tier in self._tiers for copy in tier.in_flight(slab)]

    def is_reading(self, slab: Slab) -> bool:
        """Whether a copy from `slab` is in flight."""
        return any(tier.is_reading(slab) for tier in self._tiers)

    def leave(self, slab: Slab) -> None:
        """The slab gives up its memory."""
        for tier in self._tiers:
            tier.leave(slab)

    def end_one(self) -> bool:
        """Wait for a copy in flight; False when there is none."""
        return any(tier.end_one() for tier in self._tiers)


def join_tiers(tiers: Sequence[DeviceTier]) -> Readers | None:
    """Have `tiers` know of each other; return who reads from their host memory, if anybody does."""
    for tier in tiers:
        tier.others = tuple(other.device for other in tiers if other is not tier)
    return tiers[0] if len(tiers) == 1 else JoinedTiers(tiers) if tiers else None
