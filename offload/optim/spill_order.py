"""SpillOrder: what one step reads ahead, and what it writes behind itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.tiers.slab import Slab
from offload.tiers.state_home import StateHome, page_bytes

_LEAST_PASSING, _MOST_PASSING = 4, 8
_PASSING_BYTES = 64 << 20
"""Slabs that pass through memory have room for at least four of the largest: one in use, others
being read and written. More let the disk work through while one is stepped; small slabs have them.
"""


class SpillOrder:
    """The turns of one step on one mover, of which each needs a few slabs.

    Steps take their turns in the same order, so what is farthest in the future is what was just
    used. Hence, where not everything fits, the state of the first turns stays in memory for good
    and that of the others passes through the rest.
    """

    def __init__(
        self,
        home: StateHome,
        turns: int,
        state: Callable[[int], Slab | None],
        others: Sequence[Sequence[Slab]],
    ) -> None:
        """Tell the mover what is needed when.

        Args:
            home: whose slabs these are.
            turns: how many.
            state: returns the slab of a turn's state, None while there is none.
            others: by turn, slabs of a wrapped model that it needs too; empty for a plain one.
        """
        self._mover = home.mover
        self._turns = turns
        self._state = state
        self._others = others
        self._ahead = 0
        ring = self._mover.ring
        # The ring of a wrapped model is meant for what forward and backward need.
        self._room = ring.usage()["budget"] if ring is not None and not others else 0
        self._stays: set[Slab] = set()
        self._stay_bytes = self._largest = 0
        self._known = {slab for i in range(turns) if (slab := state(i)) is not None}
        # A plain model has no other use for the disk until the next step.
        self._reads_for_next_step = bool(self._known) and not others
        self._mover.next_use = {}
        for i in range(turns):
            for slab in self._needed(i):
                self._mover.next_use.setdefault(slab, i)
        self._largest = max((page_bytes(slab.nbytes) for slab in self._known), default=0)
        fits = sum(page_bytes(slab.nbytes) for slab in self._known) <= self._room
        for i in range(turns):
            if (slab := state(i)) is not None:
                self._let_stay(slab, fits)

    def _let_stay(self, slab: Slab, all_fit: bool) -> None:
        """Have `slab` stay in memory if the rest of it is enough for others to pass."""
        nbytes = page_bytes(slab.nbytes)
        self._largest = max(self._largest, nbytes)
        passing = min(_MOST_PASSING * self._largest, _PASSING_BYTES)
        passing = 0 if all_fit else max(_LEAST_PASSING * self._largest, passing)
        if self._stay_bytes + nbytes + passing <= self._room:
            self._stay_bytes += nbytes
            self._stays.add(slab)

    def _needed(self, turn: int) -> list[Slab]:
        state = self._state(turn)
        others = self._others[turn] if self._others else ()
        return [s for s in (*others, state) if s is not None and not s.pinned]

    def begin(self, turn: int) -> None:
        """Read ahead, as far as there is room, while `turn` is taken."""
        end = turn + self._turns if self._reads_for_next_step else self._turns
        self._ahead = max(self._ahead, turn + 1)
        while self._ahead < end:
            for slab in self._needed(self._ahead % self._turns):
                if slab.lease is None and not self._mover.prefetch(slab, self._ahead):
                    return
            self._ahead += 1

    def end(self, turn: int) -> None:
        """Write behind what `turn` changed, unless it stays in memory."""
        state = self._state(turn)
        for slab in self._needed(turn):
            # Parameters are needed again by the forward, state only by the next step.
            later = 2 if slab is state and self._others else 1
            self._mover.next_use[slab] = later * self._turns + turn
        if state is None:
            return
        if state not in self._known:
            self._known.add(state)
            self._let_stay(state, all_fit=False)
        if state not in self._stays:
            self._mover.write_back(state)
            self.begin(turn)  # into what was written meanwhile
