"""ActivationPlaces: places on disk for activations, used again from step to step."""

from __future__ import annotations

from offload.tiers.swap_space import SwapSpace


class ActivationPlaces:
    """Swap objects by their size. The same sizes come in every step, so most are made once.

    Those that nobody uses are given up when another size is needed and all together would take
    more than was ever in use at once.
    """

    def __init__(self, space: SwapSpace) -> None:
        """Have the objects made in `space`."""
        self._space = space
        self._idle: dict[int, list[int]] = {}
        self._idle_bytes = 0
        self._used_bytes = 0
        self._most_used = 0

    def take(self, nbytes: int) -> int:
        """Return an object of `nbytes` that nobody uses.

        Raises:
            SwapSpaceError: ``Budget(disk=...)`` or the disk is too small for one more.
        """
        idle = self._idle.get(nbytes)
        if idle:
            found = idle.pop()
            self._idle_bytes -= nbytes
        else:
            self._shrink(max(self._most_used, self._used_bytes + nbytes) - nbytes)
            found = self._space.create(nbytes)
        self._used_bytes += nbytes
        self._most_used = max(self._most_used, self._used_bytes)
        return found

    def give_back(self, swap_object: int, nbytes: int) -> None:
        """Let others use the object, of which no transfer is in flight."""
        self._idle.setdefault(nbytes, []).append(swap_object)
        self._idle_bytes += nbytes
        self._used_bytes -= nbytes

    def _shrink(self, most: int) -> None:
        """Give up idle objects until all objects together have no more than `most` bytes."""
        for nbytes, idle in list(self._idle.items()):
            while idle and self._used_bytes + self._idle_bytes > most:
                self._space.remove(idle.pop())
                self._idle_bytes -= nbytes
            if not idle:
                del self._idle[nbytes]
