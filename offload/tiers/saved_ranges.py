"""SavedRanges: which ranges are saved, by their storage and in the order of saving."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from offload.tiers.activation_handle import Claim, SavedRange
from offload.tiers.eviction import NEVER
from offload.tiers.slab import Slab

_SAME_OPERATION = 8
"""An operation saves about so many ranges at the most. It needs them in the order in which it saved
them, though the backward goes from operation to operation in the reverse order."""


class SavedRanges:
    """The ranges that are saved. Not thread-safe: the owner serialises."""

    def __init__(self) -> None:
        """Nothing is saved."""
        self._sequence = 0
        self._now = 0  # the sequence number of what was saved or loaded last
        self._sequences: dict[Slab, int] = {}
        self._newest: SavedRange | None = None
        self._by_storage: dict[int, list[SavedRange]] = {}

    def add(self, saved: SavedRange) -> None:
        """Number `saved`, which is the newest from now on; its storage is set."""
        self._sequence += 1
        saved.sequence = self._now = self._sequence
        saved.older, saved.newer = self._newest, None
        if self._newest is not None:
            self._newest.newer = saved
        self._newest = saved
        self._by_storage.setdefault(saved.storage.cdata, []).append(saved)
        self._sequences[saved.slab] = saved.sequence

    def remove(self, saved: SavedRange) -> None:
        """Forget `saved`."""
        if saved.newer is not None:
            saved.newer.older = saved.older
        if saved.older is not None:
            saved.older.newer = saved.newer
        if self._newest is saved:
            self._newest = saved.older
        saved.older = saved.newer = None
        ranges = self._by_storage[saved.storage.cdata]
        ranges.remove(saved)
        if not ranges:
            del self._by_storage[saved.storage.cdata]
        del self._sequences[saved.slab]

    def find(self, storage: torch.UntypedStorage, begin: int, end: int) -> Claim | None:
        """Return a claim on a valid copy of those bytes of `storage`; None: there is none."""
        # The weak references keep the key from being used for another storage.
        for saved in self._by_storage.get(storage._cdata, ()):
            claim = saved.claim()
            if claim is not None and saved.serves(storage, begin, end):
                return claim
        return None

    def loading(self, saved: SavedRange) -> None:
        """Note that the backward is at `saved`."""
        self._now = saved.sequence

    def before(self, saved: SavedRange, most: int) -> Iterator[tuple[SavedRange, int]]:
        """Yield up to `most` ranges saved before `saved`, newest first, and how long before."""

        def older() -> Iterator[SavedRange]:
            at = saved.older
            while at is not None:
                yield at
                at = at.older

        return ((at, saved.sequence - at.sequence) for at in islice(older(), most))

    def use_of(self, slab: Slab) -> int:
        """When a slab is needed: what was saved before now in the reverse order, then others.

        What was saved shortly after it may belong to the same operation, and is needed at once.
        """
        sequence = self._sequences.get(slab)
        if sequence is None:
            return NEVER
        later = sequence - self._now
        if later <= 0:
            return -later
        return 0 if later <= _SAME_OPERATION else NEVER - sequence
