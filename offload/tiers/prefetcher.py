"""Prefetcher: turns the predicted uses into reads ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable

from offload.planner import Plan
from offload.tiers.mover import Mover
from offload.tiers.slab import Residency, Slab
from offload.tiers.unit import Unit
from offload.trace import AccessTrace, Phase, Use

LOOKAHEAD = 64
"""Predicted uses that are considered for prefetching and eviction."""


class Prefetcher:
    """Records uses of units and has the mover bring what the next ones need.

    Attributes:
        trace: the recorded uses.
        read_rate: bytes per second that measure_disk() saw; 0: not measured.
    """

    def __init__(self, plan: Plan, mover: Mover, settle: Callable[[Unit], None]) -> None:
        """Units join by add(); `settle` finishes an update of a unit that is done."""
        self._mover = mover
        self._settle = settle
        self._units: list[Unit] = []
        self.trace = AccessTrace()
        self.read_rate = 0.0
        self._streams = any(not (p.pin_params and p.pin_grads) for p in plan.placements)
        sizes = [max(p.unit.param_bytes, p.unit.grad_bytes) for p in plan.placements]
        self._room = plan.ring_bytes - 2 * max(sizes, default=0)  # one in use, one being written

    def add(self, unit: Unit) -> None:
        """Let `unit`, whose index is the next one, be used."""
        self._units.append(unit)

    def advance(self, use: Use) -> None:
        """Record a use, and start reading what the next ones need."""
        self.trace.record(use)
        if self._streams:
            self._look_ahead()

    def in_order_of_use(self, units: list[Unit]) -> list[Unit]:
        """Sort units by when they are needed next, as far as that is known."""
        later = len(self._units) + LOOKAHEAD
        ahead = list(enumerate(self.trace.future(LOOKAHEAD)))
        position = {use.unit: i for i, use in reversed(ahead)}
        return sorted(units, key=lambda unit: (position.get(unit.index, later), unit.index))

    def _look_ahead(self) -> None:
        """Renew the mover's view of the future and start the reads it allows."""
        self._mover.check_process()
        wanted: list[tuple[Unit, Slab]] = []
        next_use: dict[Slab, int] = {}
        for position, use in enumerate(self.trace.future(LOOKAHEAD)):
            unit = self._units[use.unit]
            slabs = [unit.param_slab]
            if use.phase is Phase.BACKWARD and unit.grad_slab is not None:
                slabs.append(unit.grad_slab)
            for slab in slabs:
                if not slab.pinned and slab not in next_use:
                    next_use[slab] = position
                    wanted.append((unit, slab))
        self._mover.next_use = next_use
        # What is read ahead beyond what fits would be given up again before its use.
        room = self._room
        for unit, slab in wanted:
            room -= slab.nbytes
            if room < 0:
                break
            if slab.lease is not None:
                continue
            if unit.update is not None:
                if not unit.update.done():
                    continue
                self._settle(unit)
            if slab is unit.grad_slab and not unit.grads_wanted():
                continue
            if not self._mover.prefetch(slab, next_use[slab]):
                break

    def measure_disk(self) -> None:
        """Fill the ring with what the first forward needs, and note how fast that was read."""
        mover = self._mover
        if mover.store is None:
            return
        slabs = [unit.param_slab for unit in self._units if not unit.param_slab.pinned]
        for slab in slabs:
            mover.settle(slab)
        for slab in slabs:
            if slab.residency is Residency.HOST and not slab.locks:
                mover.evict(slab)
        before, begun = mover.store.stats()["bytes_read"], time.perf_counter()
        mover.next_use = {slab: i for i, slab in enumerate(slabs)}
        fetched = []
        for i, slab in enumerate(slabs):
            if not mover.prefetch(slab, i):
                break
            fetched.append(slab)
        for slab in fetched:
            mover.settle(slab)
        mover.stall_seconds.clear()  # none of this was a training thread waiting
        self.read_rate = (mover.store.stats()["bytes_read"] - before) / (
            time.perf_counter() - begun
        )
