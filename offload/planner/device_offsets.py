"""Where in device memory each slab's copy goes, planned from a recorded step: a pure function.

A step repeats itself, so its moments lie on a circle. Each slab has one place for all of the step;
slabs with a byte in common take turns there. A copy stays where it is until that is needed for
another, so what a plan costs are

 1. bytes copied again, because another slab was in between where a copy had been, and of copies
    that cannot be begun while the compute is at the use before, because another is still there;
 2. after that, how soon one follows another in one place: the next copy may begin that much later.

To find the cheapest plan is NP-hard (dynamic storage allocation is). Here each slab goes where it
costs least beside those before it, those first that can save most, and then each is moved to where
it costs least beside all others, until none moves. That is done in several orders, and the cheapest
plan is taken. A slab shares no byte with those that are in memory when it is; where that leaves no
room for it, it has no place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LEASE_BYTES = 512
"""Device leases start at multiples of this, and are as long."""

ROUNDS = 4
"""After so many rounds in which a slab moved, the plan is taken as it is."""

TRIES = 4
"""How often those that found no place are put before all others."""

FEW = 256
"""Of more slabs than these, one order is tried: that takes about a second for a thousand."""

AGAIN, LATE = 4, 1
"""What a byte costs that is copied again, and one whose copy cannot be begun a use before."""

STARTS = (LATE, 2 * AGAIN)
"""What the latter costs while slabs get their first place: of these, too, the cheapest is taken."""

NEAR = 3
"""Uses before that of a slab in which its place had better be free."""


@dataclass(frozen=True)
class Span:
    """Moments `first` to `last`, both included, at which a slab has to be in device memory.

    Attributes:
        copied: its bytes come from the host then, unless they are still there.
        keeps: they are the same as in the span before: of the first one, as in the last one.
    """

    first: int
    last: int
    copied: bool = True
    keeps: bool = True


@dataclass(frozen=True)
class SlabUses:
    """A slab of `nbytes`, and the `spans` of a step in which it is used: ascending, disjoint."""

    nbytes: int
    spans: tuple[Span, ...]


def rounded(nbytes: int) -> int:
    """Return the bytes that a lease of `nbytes` takes."""
    return -(-nbytes // LEASE_BYTES) * LEASE_BYTES


def device_offsets(
    slabs: Sequence[SlabUses], use_of: Sequence[int], room: int, now: Sequence[int | None] = ()
) -> tuple[int | None, ...]:
    """Return where each of `slabs` begins, in bytes; None: it found no place.

    It is `now`, unless another plan costs less: copies of the others would have to move.

    Args:
        slabs: each has bytes, and a span.
        use_of: for each moment of the step, the number of the use that it is part of, ascending.
        room: bytes of memory.
        now: where each is as yet; none: nowhere.
    """
    room = room // LEASE_BYTES * LEASE_BYTES
    best = _Layout(slabs, use_of, room)
    best.take_over(now)
    starts = [(order, late) for order in _ORDERS for late in STARTS]
    for order, late in starts if len(slabs) <= FEW else starts[:1]:
        first: frozenset[int] = frozenset()
        for _ in range(TRIES):
            layout = _Layout(slabs, use_of, room)
            layout.place(order, first, late)
            is_as_now = best.offsets == tuple(now)
            if layout.cost[:2] < best.cost[:2] or (not is_as_now and layout.cost < best.cost):
                best = layout
            lost = frozenset(i for i, offset in enumerate(layout.offsets) if offset is None)
            if lost <= first:
                break
            first |= lost
    return best.offsets


@dataclass(frozen=True)
class _Copied:
    """Moments, as bits, that decide whether a copy has to be made, and whether in time.

    Attributes:
        gap: if nothing else is in its place then, it need not be made; 0: it is made anyway.
        before: if nothing else is in its place then, it can be begun in time.
    """

    gap: int
    before: int


class _Slab:
    """One slab of a layout: its moments as bits, and where it is.

    Attributes:
        begin: of its place; None: it has none.
        beside: those that have bytes of its place too.
        others: moments at which one of them is there.
        busy: moments at which it has to be there.
        near: moments shortly before those, at which the place had better be free.
        kept: how many copies are spared if it stays.
        start: its first moment.
    """

    def __init__(self, slab: SlabUses, use_of: Sequence[int]) -> None:
        self.need = rounded(slab.nbytes)
        self.begin: int | None = None
        self.beside: dict[_Slab, None] = {}
        self.others = 0
        self.busy = self.near = 0
        for span in slab.spans:
            self.busy |= _bits(span.first, span.last)
        self.copied: list[_Copied] = []
        for last, span in zip((slab.spans[-1], *slab.spans[:-1]), slab.spans, strict=True):
            self.near |= _uses_before(use_of, span.first, NEAR) & ~self.busy
            if span.copied:
                gap = _circular(last.last + 1, span.first - 1, len(use_of)) if span.keeps else 0
                self.copied.append(_Copied(gap, _uses_before(use_of, span.first, 1) & ~self.busy))
        self.kept = sum(copy.gap > 0 for copy in self.copied)
        self.start = (self.busy & -self.busy).bit_length()

    def cost(self, others: int, late: int = LATE) -> int:
        """Return the bytes that count, if others are in its place at these moments."""
        counts = [
            AGAIN * bool(copy.gap & others) + late * bool(copy.before & others)
            for copy in self.copied
        ]
        return sum(counts) * self.need


_Order = Callable[[_Slab], tuple[int, ...]]

_ORDERS: tuple[_Order, ...] = (
    lambda slab: (-slab.kept, -slab.need, slab.start),
    lambda slab: (-slab.kept, -slab.need, -slab.start),
    lambda slab: (-slab.kept, slab.need, slab.start),
    lambda slab: (slab.start, -slab.need),
)
"""In which slabs are placed; the first has come out best most often."""


class _Layout:
    """Places slabs, each beside those that have a place."""

    def __init__(self, slabs: Sequence[SlabUses], use_of: Sequence[int], room: int) -> None:
        self._slabs = [_Slab(slab, use_of) for slab in slabs]
        self._room = room
        self._ranges: dict[tuple[int, int], dict[_Slab, None]] = {}
        """The slabs in each range [begin, end) that is somebody's place."""

    def take_over(self, offsets: Sequence[int | None]) -> None:
        """Give them these places, unless somebody has to be there."""
        for slab, begin in zip(self._slabs, offsets, strict=False):
            if begin is not None:
                there = _union(self._overlapping(begin, begin + slab.need))
                self._put(slab, None if there & slab.busy else begin)

    def place(self, by: _Order, first: frozenset[int], late: int) -> None:
        """Give them places, in the order `by`, but for those of `first`, which come before.

        `late` is what a late byte costs when a slab gets its first place.
        """
        slabs = self._slabs
        order = sorted(range(len(slabs)), key=lambda i: (i not in first, *by(slabs[i]), i))
        for i in order:
            self._put(slabs[i], self._best(slabs[i], None, late))
        for _ in range(ROUNDS):
            moved = False
            for i in order:
                before = slabs[i].begin
                self._take(slabs[i])
                self._put(slabs[i], self._best(slabs[i], before))
                moved = moved or slabs[i].begin != before
            if not moved:
                break

    @property
    def offsets(self) -> tuple[int | None, ...]:
        """Where each begins; None: it found no place."""
        return tuple(slab.begin for slab in self._slabs)

    @property
    def cost(self) -> tuple[int, int, int]:
        """Slabs without a place, then bytes that count, then how near others are."""
        return (
            sum(slab.begin is None for slab in self._slabs),
            sum(slab.cost(slab.others) for slab in self._slabs),
            sum((slab.near & slab.others).bit_count() for slab in self._slabs),
        )

    def _put(self, slab: _Slab, begin: int | None) -> None:
        """Give `slab`, which has no place, the one at `begin`."""
        if begin is None:
            return
        slab.begin = begin
        slab.beside = dict.fromkeys(self._overlapping(begin, begin + slab.need))
        slab.others = _union(slab.beside)
        for other in slab.beside:
            other.beside[slab] = None
            other.others |= slab.busy
        self._ranges.setdefault((begin, begin + slab.need), {})[slab] = None

    def _take(self, slab: _Slab) -> None:
        """Take its place, if it has one, from `slab`."""
        if slab.begin is None:
            return
        place = slab.begin, slab.begin + slab.need
        del self._ranges[place][slab]
        if not self._ranges[place]:
            del self._ranges[place]
        for other in slab.beside:
            del other.beside[slab]
            other.others = _union(other.beside)
        slab.begin, slab.beside, slab.others = None, {}, 0

    def _overlapping(self, begin: int, end: int) -> list[_Slab]:
        return [
            slab
            for (other_begin, other_end), there in self._ranges.items()
            if other_begin < end and begin < other_end
            for slab in there
        ]

    def _best(self, slab: _Slab, before: int | None, late: int = LATE) -> int | None:
        """Return where `slab` costs least: where it was `before`, if that is as good."""
        begins = {0, self._room - slab.need}
        for begin, end in self._ranges:
            begins |= {end, begin - slab.need}
        best: tuple[int, int, bool, int] | None = None
        for begin in sorted(begins):
            if begin < 0 or begin + slab.need > self._room:
                continue
            beside = self._overlapping(begin, begin + slab.need)
            others = _union(beside)
            if others & slab.busy:
                continue
            cost, near = slab.cost(others, late), (slab.near & others).bit_count()
            for other in beside:
                both = other.others | slab.busy
                if both != other.others:
                    cost += other.cost(both, late) - other.cost(other.others, late)
                near += (other.near & slab.busy).bit_count()
            found = (cost, near, begin != before, begin)
            if best is None or found < best:
                best = found
        return None if best is None else best[-1]


def _union(slabs: Iterable[_Slab]) -> int:
    """Return the moments at which one of them is in memory."""
    union = 0
    for slab in slabs:
        union |= slab.busy
    return union


def _bits(first: int, last: int) -> int:
    """Return moments `first` to `last` as bits; none if there are none."""
    return (1 << last + 1) - (1 << first) if first <= last else 0


def _circular(first: int, last: int, moments: int) -> int:
    """Return moments `first` to `last` of a circle, which may lie past its end, as bits."""
    if first <= last + 1:
        return _bits(first, last)
    return _bits(first, moments - 1) | _bits(0, last)


def _uses_before(use_of: Sequence[int], moment: int, uses: int) -> int:
    """Return the moments of `uses` uses before that of `moment`, and those of its before it."""
    wanted = use_of[moment] - uses
    found = _bits(bisect_left(use_of, wanted), moment - 1)
    missing = use_of[0] - wanted
    if missing > 0:  # they are at the end of the step before
        from_end = bisect_right(use_of, use_of[-1] - missing)
        found |= _bits(max(moment + 1, from_end), len(use_of) - 1)
    return found
