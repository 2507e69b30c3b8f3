"""SlabBlocks: which parts of a slab are in memory while others are on disk only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

Span = tuple[int, int]
"""Bytes [begin, end) of a slab."""


class SlabBlocks:
    """The blocks of one slab that can be read by themselves, and which of them were.

    Attributes:
        arriving: those that the read in flight brings.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        """None is in memory. `spans`: of the blocks, ascending; what lies between is not used."""
        self._spans = spans
        self._begins = [begin for begin, _ in spans]
        self._here: set[int] = set()
        self.arriving: Sequence[int] = ()

    @staticmethod
    def of_size(nbytes: int, block_bytes: int) -> SlabBlocks:
        """Return those of a slab that is an object of a swap store."""
        begins = range(0, nbytes, block_bytes)
        return SlabBlocks([(begin, min(begin + block_bytes, nbytes)) for begin in begins])

    @property
    def is_complete(self) -> bool:
        """Whether all are in memory."""
        return len(self._here) == len(self._spans)

    def missing(self, ranges: Iterable[Span] | None) -> list[int]:
        """Return the blocks, ascending, that `ranges` (None: all) lie in and memory lacks."""
        if ranges is None:
            return [i for i in range(len(self._spans)) if i not in self._here]
        found = set()
        for begin, end in ranges:
            block = max(bisect_right(self._begins, begin) - 1, 0)
            while block < len(self._spans) and self._begins[block] < end:
                if self._spans[block][1] > begin and block not in self._here:
                    found.add(block)
                block += 1
        return sorted(found)

    def spans(self, blocks: Iterable[int]) -> list[Span]:
        """Return the bytes of `blocks`, which are ascending; adjacent ones are one span."""
        spans: list[Span] = []
        for block in blocks:
            begin, end = self._spans[block]
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            spans.append((begin, end))
        return spans

    def note_arrival(self) -> None:
        """The read in flight has ended well."""
        self._here.update(self.arriving)
        self.arriving = ()
