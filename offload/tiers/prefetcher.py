"""Prefetcher: turns the predicted uses into reads ahead of time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from offload.planner import Plan
from offload.tiers.device_tier import DeviceTier
from offload.tiers.eviction import NEVER
from offload.tiers.mover import Mover
from offload.tiers.slab import Residency, Slab
from offload.tiers.unit import Unit
from offload.tiers.updates import Updates
from offload.trace import AccessTrace, Phase, Use

LOOKAHEAD = 64
"""Predicted uses that are considered for prefetching and eviction."""


class Prefetcher:
    """Records uses of units and has the mover bring what the next ones need.

    Attributes:
        trace: the recorded uses.
        read_rate: bytes per second that measure_disk() saw; 0: not measured.
    """

    def __init__(
        self, plan: Plan, mover: Mover, updates: Updates, tiers: Sequence[DeviceTier]
    ) -> None:
        """Units join by add(); `updates` are those that were put off, `tiers` those of devices."""
        self._mover = mover
        self._tiers = tiers
        self._updates = updates
        self._units: list[Unit] = []
        self.trace = AccessTrace()
        self.read_rate = 0.0
        spills = any(not (p.pin_params and p.pin_grads) for p in plan.placements)
        self._streams = spills or bool(tiers)
        sizes = [max(p.unit.param_bytes, p.unit.grad_bytes) for p in plan.placements]
        self._largest = max(sizes, default=0)
        self._room = plan.ring_bytes - 2 * self._largest  # one in use, one being written

    def add(self, unit: Unit) -> None:
        """Let `unit`, whose index is the next one, be used."""
        self._units.append(unit)

    def begin_pass(self) -> None:
        """The next use is the first of a pass: an outermost forward, and its backward if any."""
        self.trace.begin_pass()
        for tier in self._tiers:
            tier.room.begin_pass()

    def end_step(self) -> None:
        """An optimizer has begun an update: the next pass is of another step."""
        self.trace.end_step()
        for tier in self._tiers:
            tier.room.places.end_step()

    def advance(self, use: Use) -> None:
        """Record a use, and start reading what the next ones need."""
        self.trace.record(use)
        for tier in self._tiers:
            tier.room.places.begin_use(use.phase is Phase.BACKWARD)
        if self._streams or self._updates.waiting:
            self._look_ahead()

    def in_order_of_use(self, units: list[Unit]) -> list[Unit]:
        """Sort units by when they are needed next, as far as that is known."""
        later = len(self._units) + LOOKAHEAD
        ahead = list(enumerate(self.trace.future(LOOKAHEAD)))
        position = {use.unit: i for i, use in reversed(ahead)}
        return sorted(units, key=lambda unit: (position.get(unit.index, later), unit.index))

    def start_updates(self) -> None:
        """Updates were put off: start those that are needed first."""
        self._look_ahead()
        if self.trace.predicts:
            return
        for unit in self._updates.waiting:  # nothing is known: in order, into what is free
            if not self._updates.start_ahead(unit, NEVER):
                return

    def _look_ahead(self) -> None:
        """Renew the mover's view of the future and start the reads and updates it allows."""
        self._mover.check_process()
        wanted: list[tuple[Unit, Slab, Phase]] = []
        next_use: dict[Slab, int] = {}
        for position, use in enumerate(self.trace.future(LOOKAHEAD)):
            unit = self._units[use.unit]
            slabs = [unit.param_slab]
            if unit.grad_slab is not None:
                if use.phase is Phase.BACKWARD:
                    slabs.append(unit.grad_slab)
                elif unit.update_waits:  # the update reads them, without memory of theirs
                    next_use.setdefault(unit.grad_slab, position)
            for slab in slabs:
                if slab not in next_use and (not slab.pinned or unit.update_waits):
                    next_use[slab] = position
                    wanted.append((unit, slab, use.phase))
        self._mover.next_use = next_use
        self._look_ahead_on_devices()  # first: from disk straight on
        # What is read ahead beyond what fits would be given up again before its use.
        room = self._room
        for unit, slab, phase in wanted:
            if not slab.pinned:
                room -= slab.nbytes
                if room < 0:
                    break
            if not self._bring(unit, slab, next_use[slab], phase):
                break

    def _look_ahead_on_devices(self) -> None:
        """Start copying to the devices what the next uses, and updates before them, need.

        In the order of use, so that the next device's first units come while this one computes;
        each device stops where its memory ends.
        """
        if not self._tiers:
            return
        wanted: list[tuple[Unit, DeviceTier, Slab, bool]] = []
        room = {}
        for tier in self._tiers:
            tier.room.next_use, tier.room.places.needs = {}, self._in_use(tier)
            room[tier] = tier.room.ring.usage()["budget"] - 2 * self._largest
        in_step = self.trace.in_step(LOOKAHEAD)
        for position, use in enumerate(self.trace.future(LOOKAHEAD)):
            unit = self._units[use.unit]
            update, there = self._updates.for_device(unit), unit.tier
            if there not in room:
                continue
            for slab in update or [unit.param_slab]:
                if not there.room.places.is_used(slab, use.phase is Phase.BACKWARD):
                    continue
                there.room.places.needs.setdefault(slab, position)
                if position >= in_step and there.room.places.is_replaced(slab):
                    continue  # what is copied now would be worth nothing then
                if slab not in there.room.next_use:
                    there.room.next_use[slab] = position
                    wanted.append((unit, there, slab, bool(update)))
            if use.phase is Phase.BACKWARD and unit.grad_slab is not None:
                there.room.places.needs.setdefault(unit.grad_slab, position)  # made there
        for unit, tier, slab, is_update in wanted:
            if tier not in room:
                continue
            room[tier] -= slab.nbytes
            full = room[tier] < 0 or (unit.updating and not is_update)
            if full or not tier.prefetch(slab, tier.room.next_use[slab]):
                del room[tier]

    def _in_use(self, tier: DeviceTier) -> dict[Slab, int]:
        """Return what the current uses need on the device, whose places are to be kept."""
        needs: dict[Slab, int] = {}
        for unit in self._units:
            if unit.tier is not tier or not unit.param_slab.locks:
                continue
            slabs = [unit.param_slab, *self._updates.for_device(unit)]
            if unit.in_backward and unit.grad_slab is not None:
                slabs.append(unit.grad_slab)
            needs.update(dict.fromkeys(slabs, -1))
        return needs

    def _bring(self, unit: Unit, slab: Slab, use: int, phase: Phase) -> bool:
        """Start what makes `slab` ready for use number `use`; False when there is no room.

        Which rows a forward will need of a unit that goes by rows is known when its router has run.
        Where the latest one needed all, the next one is taken to do so too.
        """
        if unit.update_waits:
            return self._updates.start_ahead(unit, use)
        if slab.pinned or slab.lease is not None:
            return True
        if unit.update is not None:
            if not unit.update.done():
                return True
            self._updates.finish(unit)
        if slab is unit.grad_slab and not unit.grads_wanted():
            return True
        by_row = slab is unit.param_slab and unit.by_row and unit.tier is None
        if by_row and unit.routed is not None:
            if phase is Phase.FORWARD or unit.saved_rows is None:
                return True
            return self._mover.prefetch(slab, use, unit.ranges(unit.saved_rows.rows))
        return self._mover.prefetch(slab, use)

    def measure_disk(self) -> None:
        """Fill the ring with what the first forward needs, and note how fast that was read."""
        mover = self._mover
        if mover.store is None:
            return
        units = [unit for unit in self._units if not unit.param_slab.pinned]
        for unit in units:
            mover.settle(unit.param_slab)
        for unit in units:
            slab = unit.param_slab
            if slab.residency is Residency.HOST and not slab.locks:
                mover.evict(slab)
        whole = [unit for unit in units if unit.tier is not None or not unit.by_row]
        slabs = [unit.param_slab for unit in whole]
        before, begun = mover.read_bytes, time.perf_counter()
        mover.next_use = {slab: i for i, slab in enumerate(slabs)}
        fetched = []
        for i, slab in enumerate(slabs):
            if not mover.prefetch(slab, i):
                break
            fetched.append(slab)
        for slab in fetched:
            mover.settle(slab)
        mover.stall_seconds.clear()  # none of this was a training thread waiting
        self.read_rate = (mover.read_bytes - before) / (time.perf_counter() - begun)
