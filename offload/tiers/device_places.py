"""DevicePlaces: where in the ring of a device each slab's copy goes, planned from a recorded step.

Protocol:
 1. record: what is in use on the device at each moment of a step (note_use), in which of the
    predicted uses that is (begin_use), and when a copy has become worthless (note_change).
 2. begin_pass, when an outermost forward begins: a step has ended if an optimizer has begun
    updates, or if there was no backward. It is the one to plan for when there is none yet, when it
    uses a slab that has no place, or when it has come twice and is not the one planned for.
 3. place_of says where a copy goes, and is_free_until whether others will need the bytes sooner.
Slabs keep their places for as long as the plan does, so a step of another order is as exact as any:
a copy whose place is in use goes elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from offload.planner.device_offsets import SlabUses, Span, device_offsets, rounded
from offload.tiers.eviction import NEVER
from offload.tiers.slab import Slab

_LONGEST = 1 << 14
"""Moments after which a step is taken to have ended."""


class _Step:
    """What one step used.

    Attributes:
        moments: what was in use at each of them.
        uses: for each moment, the number of its use.
        order: for each moment, the slab whose use began with it.
        changed: (slab, moment) before which its copy had become worthless.
        made: (slab, moment) at which its bytes were not copied, but made on the device.
        in_backward: slabs that were used in the backward's uses.
        use: the number of uses so far.
        is_backward: the latest of them is one of the backward.
        had_backward: one of them was.
        updated: an optimizer has begun updates.
    """

    def __init__(self) -> None:
        self.moments: list[frozenset[Slab]] = []
        self.uses: list[int] = []
        self.order: list[Slab] = []
        self.changed: set[tuple[Slab, int]] = set()
        self.made: set[tuple[Slab, int]] = set()
        self.in_backward: set[Slab] = set()
        self.use = 0
        self.is_backward = False
        self.had_backward = False
        self.updated = False

    @property
    def has_ended(self) -> bool:
        """Whether a pass that begins now is of another step."""
        if not self.had_backward:
            return self.use > 0
        return self.updated or len(self.moments) >= _LONGEST

    def slab_uses(self) -> dict[Slab, SlabUses]:
        """Return what it used of each slab."""
        times: dict[Slab, list[int]] = {}
        for moment, slabs in enumerate(self.moments):
            for slab in slabs:
                times.setdefault(slab, []).append(moment)
        changes: dict[Slab, set[int]] = {}
        for slab, moment in self.changed:
            changes.setdefault(slab, set()).add(moment)
        return {
            slab: SlabUses(slab.nbytes, self._spans(slab, moments, changes.get(slab, set())))
            for slab, moments in times.items()
        }

    def _spans(self, slab: Slab, moments: list[int], changes: set[int]) -> tuple[Span, ...]:
        runs: list[tuple[int, int]] = []
        for moment in moments:
            if runs and runs[-1][1] == moment - 1:
                runs[-1] = runs[-1][0], moment
            else:
                runs.append((moment, moment))
        spans = []
        for (_, before), (first, last) in zip((runs[-1], *runs[:-1]), runs, strict=True):
            if before < first:
                changed = any(before < moment <= first for moment in changes)
            else:
                changed = any(before < moment or moment <= first for moment in changes)
            copied = not any((slab, moment) in self.made for moment in range(first, last + 1))
            spans.append(Span(first, last, copied, keeps=not changed))
        return tuple(spans)


class DevicePlaces:
    """The plan of one ring. Not thread-safe: the owner serialises.

    Attributes:
        needs: position of the next use of each slab's place among the predicted uses; of what is
            in use, -1.
        planned: copies that went to their places.
        searched: copies that went to where there was room.
    """

    def __init__(self, room: int) -> None:
        """Plan a ring of `room` bytes."""
        self.needs: dict[Slab, int] = {}
        self.planned = 0
        self.searched = 0
        self._room = room
        self._step = _Step()
        self._last: list[Slab] = []
        """The order of the last step."""
        self._planned_for: list[Slab] = []
        self._replaced: set[Slab] = set()
        """Whose copies the last step made worthless."""
        self._in_backward: set[Slab] | None = None
        """Those that the uses of the last backward needed; None: there was none."""
        self._known: set[Slab] = set()
        """Those that the plan was made for: some may have found no place."""
        self._places: dict[Slab, int] = {}
        self._sharing: dict[Slab, list[Slab]] = {}
        """Those with bytes of its place."""

    # -- the record -------------------------------------------------------------------------------

    def begin_use(self, in_backward: bool) -> None:
        """A use of the trace begins."""
        self._step.use += 1
        self._step.is_backward = in_backward
        self._step.had_backward |= in_backward

    def note_use(self, slab: Slab, in_use: Iterable[Slab], made: bool) -> None:
        """The copy of `slab` is used from now on, beside those `in_use`.

        Args:
            slab: of the ring.
            in_use: of the ring too.
            made: its bytes are made on the device.
        """
        step = self._step
        if step.is_backward:
            step.in_backward.add(slab)
        if step.order and step.order[-1] is slab and step.uses[-1] == step.use and not made:
            return
        if made:
            step.made.add((slab, len(step.moments)))
        step.moments.append(frozenset((slab, *in_use)))
        step.uses.append(step.use)
        step.order.append(slab)

    def note_change(self, slab: Slab) -> None:
        """A copy of `slab` is worth nothing from now on."""
        self._step.changed.add((slab, len(self._step.moments)))

    def end_step(self) -> None:
        """An optimizer has begun an update: the step ends before the next pass."""
        self._step.updated = True

    # -- the plan ---------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """An outermost forward begins: plan anew if a step has ended for which that is due."""
        step = self._step
        if not step.use:
            self._step = _Step()  # what was used before the first pass
        if not step.has_ended:
            return
        self._step = _Step()
        self._replaced = {slab for slab, _ in step.changed} if step.updated else set()
        if step.had_backward:
            self._in_backward = step.in_backward
        again, self._last = step.order == self._last, step.order
        if not step.order or step.order == self._planned_for:
            return
        if again or not self._known.issuperset(step.order):
            self._plan(step)
            self._planned_for, self._known = step.order, set(step.order)

    def _plan(self, step: _Step) -> None:
        used = step.slab_uses()
        now = [self._places.get(slab) for slab in used]
        offsets = device_offsets(list(used.values()), step.uses, self._room, now)
        places = {
            slab: offset for slab, offset in zip(used, offsets, strict=True) if offset is not None
        }
        self._sharing = {
            slab: [
                other
                for other, begin in places.items()
                if begin < offset + rounded(slab.nbytes)
                and offset < begin + rounded(other.nbytes)
                and other is not slab
            ]
            for slab, offset in places.items()
        }
        self._places = places

    def place_of(self, slab: Slab) -> int | None:
        """Return where the copy of `slab` goes, in bytes; None: nothing was planned for it."""
        return self._places.get(slab)

    def is_replaced(self, slab: Slab) -> bool:
        """Whether a copy of `slab` from this step is worth nothing in the next, as it seems."""
        return slab in self._replaced

    def is_used(self, slab: Slab, in_backward: bool) -> bool:
        """Whether such a use needs the bytes of `slab`, as it seems: that of an embedding's does.

        Its backward does not.
        """
        return not in_backward or self._in_backward is None or slab in self._in_backward

    def is_free_until(self, slab: Slab, use: int) -> bool:
        """Whether nobody needs the place of `slab` before it does, at use number `use` from now."""
        return all(self.needs.get(other, NEVER) > use for other in self._sharing.get(slab, ()))
