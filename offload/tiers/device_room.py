"""DeviceRoom: the memory of a device, and which copies of slabs are where in it.

Slabs of units that are in use while others come and go have a place of their own (home). Once a
step has been recorded, the others have places in the ring, planned so that little has to be copied
again (device_places.py): who is there when a copy comes is dropped. A copy whose place is in use,
or that has none, goes to where there is room: copies that nobody holds, by a lock on their slab,
are given up for it, the one needed farthest in the future first. Tensors on a copy keep its memory
for as long as they live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload import _native
from offload.errors import BudgetError
from offload.planner.device_offsets import rounded
from offload.tiers.device_copy import DeviceCopy
from offload.tiers.device_places import DevicePlaces
from offload.tiers.eviction import NEVER, no_room_there
from offload.tiers.slab import Slab


class DeviceRoom:
    """The copies on one device and the memory they are in. Not thread-safe: the owner serialises.

    Attributes:
        home: memory of slabs with a place of their own; None: there are none.
        ring: memory of those that come and go.
        copies: of slabs, on the device.
        places: where in the ring the copies go.
        next_use: position of each slab's next use among the predicted uses.
        held: slabs whose copies an update is about to use.
        relieve: makes a user of memory let go; False when there is none.
    """

    def __init__(
        self,
        home: _native.DeviceArena | None,
        ring: _native.DeviceArena,
        name: str,
        await_arrival: Callable[[Slab, _native.DeviceTransfer], None],
        note_end: Callable[[Slab, DeviceCopy], None],
    ) -> None:
        """Nothing is on the device.

        Args:
            home: see above.
            ring: see above.
            name: of the device, for people.
            await_arrival: has the host wait until a copy is submitted, and what is copied to the
                device later wait for it.
            note_end: is told of each copy that is given up.
        """
        self.home = home
        self.ring = ring
        self.copies: dict[Slab, DeviceCopy] = {}
        self.places = DevicePlaces(ring.usage()["budget"])
        self.next_use: dict[Slab, int] = {}
        self.held: set[Slab] = set()
        self.relieve: Callable[[], bool] = lambda: False
        self._name = name
        self._await_arrival = await_arrival
        self._note_end = note_end
        self._leaving: list[tuple[Slab, _native.DeviceTransfer]] = []
        """Copies given up while they were read from disk: they keep the memory until then."""
        self._at_home: dict[Slab, int] = {}
        """Where in the home they are."""
        self._home_bytes = 0

    def keep_at_home(self, slab: Slab) -> None:
        """Give `slab` its place in the home whenever it is copied."""
        self._at_home[slab] = self._home_bytes
        self._home_bytes += rounded(slab.nbytes)

    def begin_pass(self) -> None:
        """An outermost forward begins: what is in another place than planned is given up."""
        self.places.begin_pass()
        for slab, copy in list(self.copies.items()):
            place = self.places.place_of(slab)
            if place is not None and place != copy.lease.offset and self._may_go(slab, copy):
                self._give_up(slab)

    def note_use(self, slab: Slab, made: bool = False) -> None:
        """Note that the copy of `slab` is used, or `made`, beside those in use: it places them."""
        if slab not in self._at_home:
            in_use = (s for s, c in self.copies.items() if not self._may_go(s, c))
            self.places.note_use(slab, (s for s in in_use if s not in self._at_home), made)

    def check_room(self, slabs: Sequence[Slab], what: str) -> None:
        """Raise BudgetError when `slabs`, all used here, can never be on the device together."""
        needed = sum(slab.nbytes for slab in slabs if slab not in self._at_home)
        room = self.ring.usage()["budget"]
        if needed > room:
            raise BudgetError(
                f"{what} cannot be on {self._name} as a whole: its parameters need {needed} bytes, "
                f"and {room} of the device budget are for what comes and goes; materialize() one "
                "of its modules at a time, or raise Budget(device=...)"
            )

    def take(self, slab: Slab) -> _native.DeviceLease:
        """Return memory for a copy of `slab`, which nobody else has.

        Raises:
            BudgetError: all that is there is in use, and nobody lets go.
        """
        while True:
            lease = self.try_take(slab, farther_than=None)
            if lease is not None:
                return lease
            if not self.relieve():
                raise no_room_there(slab, self.copies, self.ring, self._name)

    def try_take(self, slab: Slab, farther_than: int | None) -> _native.DeviceLease | None:
        """Return the same, or None: nobody is made to let go.

        With `farther_than`, only copies needed after that use number from now are given up.
        """
        arena, place = self.ring, self.places.place_of(slab)
        if slab in self._at_home and self.home is not None:
            arena, place = self.home, self._at_home[slab]
        if place is not None:
            lease = self._take_place(slab, arena, place, farther_than)
            if lease is not None or farther_than is not None:
                return lease
        while True:
            lease = arena.try_allocate(slab.nbytes, slab.name)
            if lease is not None:
                self.places.searched += 1
                return lease
            victim = self._victim(farther_than)
            if victim is not None:
                self._give_up(victim)
            elif farther_than is None and self._leaving:
                self._await_arrival(*self._leaving.pop(0))
            else:
                return None

    def _take_place(
        self, slab: Slab, arena: _native.DeviceArena, place: int, farther_than: int | None
    ) -> _native.DeviceLease | None:
        """Return its place in `arena`, dropping what is there; None: that is in use, or needed."""
        if farther_than is not None and not self.places.is_free_until(slab, farther_than):
            return None
        lease = arena.try_allocate_at(place, slab.nbytes, slab.name)
        if lease is None and arena is self.ring and self._clear_place(slab, place, farther_than):
            lease = arena.try_allocate_at(place, slab.nbytes, slab.name)
        if lease is not None:
            self.places.planned += 1
        return lease

    def _clear_place(self, slab: Slab, place: int, farther_than: int | None) -> bool:
        """Give up the copies that are in the place of `slab`, if all of them may go."""
        end = place + rounded(slab.nbytes)
        there = []
        for other, copy in self.copies.items():
            lease = copy.lease
            if lease.offset >= end or lease.offset + lease.nbytes <= place:
                continue
            if other in self._at_home:
                continue
            if not self._may_go(other, copy, farther_than):
                return False
            there.append(other)
        for other in there:
            self._give_up(other)
        return True

    def clear(self) -> None:
        """Give up all copies that nobody holds by a lock and that are not ahead."""
        for slab, copy in list(self.copies.items()):
            if not (slab.locks or copy.ahead or slab in self._at_home):
                self._give_up(slab)

    def _give_up(self, slab: Slab) -> None:
        self._leaving = [left for left in self._leaving if not left[1].issued()]
        copy = self.copies.pop(slab)
        if copy.arrival is not None and not copy.arrival.issued():
            self._leaving.append((slab, copy.arrival))
        self._note_end(slab, copy)

    def _may_go(self, slab: Slab, copy: DeviceCopy, farther_than: int | None = None) -> bool:
        """Whether nobody holds the copy, and it is needed after use number `farther_than`."""
        if slab.locks or copy.ahead or slab in self._at_home or slab in self.held:
            return False
        if farther_than is None:
            return True
        if copy.arrival is not None and not copy.arrival.issued():
            return False  # it keeps the memory until it has been read
        return self.next_use.get(slab, NEVER) > farther_than

    def _victim(self, farther_than: int | None) -> Slab | None:
        """The slab whose copy to give up: held by nobody, not ahead, needed last."""
        may_go = [s for s, copy in self.copies.items() if self._may_go(s, copy, farther_than)]
        return max(may_go, key=lambda slab: self.next_use.get(slab, NEVER), default=None)
