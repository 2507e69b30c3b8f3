"""Which slab gives up its memory for another, and what is said when none can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from offload import _native
from offload.errors import BudgetError
from offload.tiers.slab import Arrival, Slab

NEVER = 1 << 60


class Readers(Protocol):
    """Copies from the memory of slabs that somebody else makes."""

    def settle(self, slab: Slab) -> None:
        """Wait until none from `slab` is in flight: its bytes may be changed."""

    def in_flight(self, slab: Slab) -> Sequence[Arrival]:
        """Return those from `slab`, for a native job that is to change its bytes to follow."""

    def is_reading(self, slab: Slab) -> bool:
        """Whether one from `slab` is in flight."""

    def end_one(self) -> bool:
        """Wait for the oldest in flight; False when there is none."""

    def leave(self, slab: Slab) -> None:
        """The memory of `slab` is about to be given up."""


def choose_victim(
    slabs: Iterable[Slab],
    use_of: Callable[[Slab], int],
    readers: Readers | None,
    farther_than: int | None,
) -> Slab | None:
    """Return the slab to evict: held by nobody, clean or unwanted, needed last (Belady).

    Args:
        slabs: unpinned, with memory.
        use_of: position of a slab's next use among the predicted uses.
        readers: what they copy from would keep its memory.
        farther_than: a wanted slab is chosen only if its next use is after this one.
    """
    best, best_use = None, -1 if farther_than is None else farther_than
    for slab in slabs:
        if slab.locks or slab.pending is not None:
            continue
        if readers is not None and readers.is_reading(slab):
            continue
        if not slab.wanted:
            return slab
        use = use_of(slab)
        if not slab.dirty and use > best_use:
            best, best_use = slab, use
    return best


def no_room(slab: Slab, slabs: Iterable[Slab], ring: _native.HostArena | None) -> BudgetError:
    """Return the error that says why `slab` cannot have memory beside `slabs`, which have some."""
    usage = ring.usage() if ring is not None else {}
    held = [f"{s.name} ({s.nbytes} bytes)" for s in slabs if s.locks]
    return BudgetError(
        f"no room for {slab.name}: {slab.nbytes} bytes are needed, of {usage.get('budget', 0)} "
        f"bytes for spilled tensors {usage.get('budget', 0) - usage.get('in_use', 0)} are free "
        f"(longest range {usage.get('largest_free', 0)}); in use at this moment: "
        f"{', '.join(held) or 'nothing'}; raise Budget(host=...)"
    )


def no_room_there(
    slab: Slab, slabs: Iterable[Slab], ring: _native.DeviceArena, device: str
) -> BudgetError:
    """Return the error that says why `slab` cannot be on `device` beside `slabs`, which are."""
    usage = ring.usage()
    held = [f"{s.name} ({s.nbytes} bytes)" for s in slabs if s.locks]
    return BudgetError(
        f"no room for {slab.name} on {device}: {slab.nbytes} bytes are needed, of "
        f"{usage['budget']} bytes {usage['budget'] - usage['in_use']} are free (longest range "
        f"{usage['largest_free']}); in use at this moment: {', '.join(held) or 'nothing'}; "
        "raise Budget(device=...)"
    )
