"""SwapSpace: an open swap store, and what of it is promised to objects."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from offload import _native
from offload.errors import OffloadError, SwapSpaceError
from offload.policy import Policy
from offload.tiers.disk_profile import DiskProfile, disk_profile

_PHASE_BYTES = 32 << 20
"""Read or written at a time on a disk that does not take a mix well: long enough that a change of
direction costs little, short enough that a fetch does not wait long for its turn."""


def profile_disks(policy: Policy) -> tuple[DiskProfile, ...]:
    """Return the rates of the policy's swap directories; none when it does not want them measured.

    Raises:
        SwapIOError: a swap directory cannot be used.
    """
    if not policy.calibrate_disk:
        return ()
    return tuple(disk_profile(folder) for folder in policy.swap_dirs)


def store_memory(policy: Policy) -> int:
    """Return the host memory in bytes that the policy's swap store takes for itself."""
    if not policy.swap_dirs or not policy.encrypt_swap:
        return 0
    return _native.SwapStore.bounce_bytes_for(
        len(policy.swap_dirs), policy.queue_depth, policy.block_bytes
    )


class SwapSpace:
    """The swap files of one policy. All objects are created here, within ``Budget(disk=...)``.

    Attributes:
        store: where the objects are.
    """

    def __init__(self, policy: Policy, profiles: Sequence[DiskProfile]) -> None:
        """Open unnamed files in the swap directories; nothing is reserved yet.

        Args:
            policy: has a swap directory.
            profiles: of its directories, or none.

        Raises:
            SwapIOError: a directory cannot be used.
        """
        if not policy.swap_dirs:
            raise OffloadError("something spills without a swap directory (internal error)")
        measured = bool(profiles) and all(p.measured for p in profiles)
        self.store = _native.SwapStore(
            list(policy.swap_dirs),
            policy.io_engine,
            policy.queue_depth,
            block_bytes=policy.block_bytes,
            rates=[p.turns_bps for p in profiles] if measured else [],
            phase_bytes=[_PHASE_BYTES if p.phases else 0 for p in profiles],
            encrypt=policy.encrypt_swap,
        )
        self._limit = policy.budget.disk_bytes
        self._host_bytes = policy.budget.host_bytes
        self._profiles = tuple(profiles)
        self._bytes = 0  # promised to objects, and how many objects
        self._objects = 0
        self._used = 0  # footprints of the objects there are

    def reserve(self, nbytes: int, objects: int) -> None:
        """Have room for `objects` more objects of `nbytes` in all, on top of earlier promises.

        Room for the versions being replaced is part of it: no more of them exist at a moment than
        the host budget holds.

        Raises:
            SwapSpaceError: ``Budget(disk=...)`` or the disk is too small; nothing was promised.
        """
        count, block = self._objects + objects, self.store.block_bytes
        wanted = self._bytes + nbytes + count * block
        spare = min(self._host_bytes, wanted) + count * block
        if self._limit is not None and wanted + spare > self._limit:
            raise SwapSpaceError(
                errno.ENOSPC,
                f"Budget(disk={self._limit}) is too small: {wanted} bytes live on disk and {spare} "
                f"more are needed while they are replaced, {wanted + spare} in all",
            )
        self.store.reserve(wanted, spare)
        self._bytes += nbytes
        self._objects = count

    def create(self, nbytes: int) -> int:
        """Return a new object of `nbytes`, reserving what earlier promises do not cover.

        Raises:
            SwapSpaceError: as reserve().
        """
        footprint = self.store.footprint(nbytes)
        if self._used + footprint > self._bytes + self._objects * self.store.block_bytes:
            self.reserve(nbytes, 1)
        created = self.store.create(nbytes)
        self._used += footprint
        return created

    def remove(self, swap_object: int) -> None:
        """Give up an object of which no transfer is in flight; its room goes to later ones."""
        footprint = self.store.footprint(self.store.nbytes(swap_object))
        self.store.remove(swap_object)
        self._used -= footprint

    def notes(self) -> tuple[str, ...]:
        """Return which choices were made, and why."""
        store = self.store
        notes = [f"I/O engine: {store.engine} ({store.engine_reason})"]
        if store.encrypted:
            notes.append("swap is encrypted (AES-256-XTS, key in memory only)")
        notes += [p.note for p in self._profiles if p.note]
        return (*notes, store.note) if store.note else tuple(notes)
