"""Traffic: the bytes that a step moves, found by going through its uses one by one.

The model is the runtime's: spilled slabs pass through the ring, and when it is full, the one whose
next use is farthest goes (L. A. Belady, "A study of replacement algorithms for a virtual-storage
computer", 1966). Dirty slabs are written when their use ends, so giving one up costs nothing more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence

from offload.planner.spec import Plan, Traffic

FORWARD, BACKWARD = False, True
UnitUse = tuple[int, bool]
"""A unit's index, and whether it is used in a backward."""

_STEPS = 3
"""Steps that are gone through; the last one is counted: what the ring holds is periodic by then."""


_PARAMS, _GRADS, _STATES = 0, 1, 2
_Slab = tuple[int, int]
"""A unit's index, and which of its slabs; from _STATES on, those of its optimizer state."""

_NEVER = 1 << 60
"""The next use of a state, of which the runtime records none."""


def step_traffic(
    plan: Plan,
    micro_batches: int = 1,
    uses: Sequence[UnitUse] | None = None,
    lazy: bool = True,
    state: Sequence[int] | None = None,
    on_device: Collection[int] = (),
) -> Traffic:
    """Return the bytes that one optimizer step moves between host and disk in the steady state.

    Args:
        plan: where everything lives.
        micro_batches: forwards and backwards per step, with gradients accumulated.
        uses: of one micro-batch, in order. None: every unit once in the forward, in the order of
            the plan, and once in the backward, in the reverse order.
        lazy: the update of a unit runs before its first use in the next step, which needs no read
            of its own then. False: all run at the end of the step.
        state: bytes of optimizer state on disk, by unit. None: what the plan assumes.
        on_device: units whose updates run on a device, with the least memory there: all that they
            use comes through the ring.
    """
    if uses is None:
        order = range(len(plan.placements))
        uses = [(i, FORWARD) for i in order] + [(i, BACKWARD) for i in reversed(order)]
    if state is None:
        state = [0 if p.pin_state else p.unit.state_bytes for p in plan.placements]
    walk = _Walk(plan, list(uses) * micro_batches, lazy, state, on_device)
    for _ in range(_STEPS):
        walk.step()
    return Traffic(walk.read, walk.written)


class _Walk:
    """The ring's content while steps are gone through; `read` and `written` are the last step's."""

    def __init__(
        self,
        plan: Plan,
        uses: list[UnitUse],
        lazy: bool,
        state: Sequence[int],
        on_device: Collection[int],
    ) -> None:
        self._plan = plan
        self._on_device = frozenset(on_device)
        self._going: list[_Slab] = []  # results of the last update on a device
        self._state = state
        self._uses = uses
        self._lazy = lazy
        self._ring: dict[_Slab, int] = {}  # bytes of what is in it
        self._positions: dict[_Slab, list[int]] = {}  # of its uses in a step
        self._to_update: set[int] = set()
        self._has_grads: set[int] = set()
        self.read = 0
        self.written = 0
        first_of: dict[int, int] = {}
        for position, (unit, backward) in enumerate(uses):
            first_of.setdefault(unit, position)
            self._positions.setdefault((unit, _PARAMS), []).append(position)
            if backward:
                self._positions.setdefault((unit, _GRADS), []).append(position)
        self._order = list(first_of) if lazy else sorted(first_of)
        for unit, position in first_of.items():
            grads = self._positions.get((unit, _GRADS))
            if lazy and grads is not None:  # the update reads them
                grads.insert(0, position)

    def step(self) -> None:
        """Go through one step."""
        self.read = self.written = 0
        for now, (unit, backward) in enumerate(self._uses):
            if unit in self._to_update:
                self._update(unit, now)
            self._use(unit, backward, now)
        self._to_update = set(self._has_grads)
        if not self._lazy:
            for unit in sorted(self._to_update):
                self._update(unit, len(self._uses))

    def _use(self, unit: int, backward: bool, now: int) -> None:
        placement = self._plan.placements[unit]
        params, grads = (unit, _PARAMS), (unit, _GRADS)
        if not placement.pin_params:
            self._bring(params, placement.unit.param_bytes, now, [params])
        if not backward or placement.unit.grad_bytes == 0:
            return
        if not placement.pin_grads:
            nbytes = placement.unit.grad_bytes
            accumulates = unit in self._has_grads
            self._bring(grads, nbytes, now, [params, grads], reads=accumulates)
            self.written += nbytes
        self._has_grads.add(unit)

    def _update(self, unit: int, now: int) -> None:
        if unit in self._on_device:
            self._update_on_device(unit, now)
        else:
            self._update_in_place(unit, now)
        self._to_update.discard(unit)
        self._has_grads.discard(unit)

    def _update_on_device(self, unit: int, now: int) -> None:
        """All that it uses comes through the ring; what it changes goes home that way.

        Meanwhile the results of the update before it still go, and the next one's slabs come.
        """
        slabs = self._spilled(unit)
        changed = [slab for slab in slabs if slab != (unit, _GRADS)]
        held = {*slabs, *self._going}
        for slab, nbytes in slabs.items():
            self._bring(slab, nbytes, now, held)
        for slab, nbytes in self._spilled(self._next_update(unit)).items():
            held.add(slab)
            if sum(self._ring.get(s, 0) for s in held) + nbytes > self._plan.ring_bytes:
                break
            self._bring(slab, nbytes, now, held)
        self.written += sum(slabs[slab] for slab in changed)
        self._going = changed
        self._ring.pop((unit, _GRADS), None)

    def _next_update(self, unit: int) -> int | None:
        """The one after `unit` whose update is to run on a device."""
        waiting = (u for u in self._order if u in self._to_update and u != unit)
        return next((u for u in waiting if u in self._on_device), None)

    def _spilled(self, unit: int | None) -> dict[_Slab, int]:
        """The slabs that the update of `unit` uses and that are not pinned, and their bytes."""
        if unit is None:
            return {}
        placement = self._plan.placements[unit]
        slabs = {}
        if not placement.pin_params:
            slabs[unit, _PARAMS] = placement.unit.param_bytes
        if not placement.pin_grads:
            slabs[unit, _GRADS] = placement.unit.grad_bytes
        left = self._state[unit]
        for number in range(placement.unit.state_slabs if left else 0):
            slabs[unit, _STATES + number] = left // (placement.unit.state_slabs - number)
            left -= slabs[unit, _STATES + number]
        return slabs

    def _update_in_place(self, unit: int, now: int) -> None:
        placement = self._plan.placements[unit]
        params, grads = (unit, _PARAMS), (unit, _GRADS)
        nbytes = placement.unit.grad_bytes
        if not placement.pin_params:
            in_memory = params in self._ring
            if self._lazy:
                self._bring(params, placement.unit.param_bytes, now, [params, grads])
            elif not in_memory:
                self.read += nbytes
            # Updated in memory, the slab is written as a whole, with the frozen ones in it.
            self.written += placement.unit.param_bytes if in_memory else nbytes
        if not placement.pin_grads and self._ring.pop(grads, None) is None:
            self.read += nbytes
        self.read += self._state[unit]
        self.written += self._state[unit]

    def _bring(
        self, slab: _Slab, nbytes: int, now: int, held: Iterable[_Slab], reads: bool = True
    ) -> None:
        if slab in self._ring:
            return
        self.read += nbytes if reads else 0
        free = self._plan.ring_bytes - sum(self._ring.values())
        while free < nbytes:
            evictable = [s for s in self._ring if s not in held]
            if not evictable:
                break
            farthest = max(evictable, key=lambda s: self._next_use(s, now))
            free += self._ring.pop(farthest)
        self._ring[slab] = nbytes

    def _next_use(self, slab: _Slab, now: int) -> int:
        """How many uses from now `slab` is needed next."""
        positions = self._positions.get(slab)
        if positions is None:
            return _NEVER
        following = bisect_right(positions, now)
        if following < len(positions):
            return positions[following] - now
        return positions[0] + len(self._uses) - now
