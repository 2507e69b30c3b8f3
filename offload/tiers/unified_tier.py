"""UnifiedTier: a device whose memory is the host's. Nothing is copied: what one writes is there.

Protocol of a slab that the compute uses:
 1. fetch: its bytes are brought to host memory as for the CPU, and tensors lie on that memory. A
    DeviceCopy here is the right to use it, for as long as the slab has the memory.
 2. the compute is not waited for. Whoever changes bytes on the host waits first until the compute
    has used them (settle), and memory is not given up before that either (is_reading, end_one): a
    tensor that somebody keeps, keeps the memory.
 3. what the compute makes in a slab goes to disk after an event (send), which the host does not
    wait for. Before the compute uses the slab again, the host waits for that write (fetch).
Updates run on the CPU, whose memory it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload import _native
from offload.errors import OffloadError
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.device_copy import DeviceCopy
from offload.tiers.device_tier import DeviceTier
from offload.tiers.mover import Mover
from offload.tiers.slab import Arrival, Slab


class UnifiedTier(DeviceTier):
    """The use of host memory by the device of one wrapped model. Not thread-safe, as its base."""

    shares_memory = True

    def __init__(
        self, compute: ComputeDevice, arenas: Sequence[_native.HostArena], mover: Mover
    ) -> None:
        """Use slabs of `mover`, whose arenas are pinned for the device."""
        self._over = [_native.DeviceArena.over_host(compute.native, arena) for arena in arenas]
        super().__init__(compute, None, self._over[0], mover)
        self._parting: list[tuple[_native.DeviceLease, _native.Lease]] = []
        """Memory that slabs have given up while it was in use."""

    def keep_at_home(self, slab: Slab) -> None:
        """Its place is where the host has it."""

    def fetch(self, slab: Slab) -> DeviceCopy:
        """Return the current bytes of `slab`, which is locked, ready to be used and changed.

        What was to be written of them has been.
        """
        self._mover.fetch(slab)
        return self.ready(slab)

    def hold_new(self, slab: Slab) -> DeviceCopy:
        """Return the memory of `slab`, which has some, to be filled by the compute stream."""
        return self.ready(slab)

    def ready(self, slab: Slab, change: bool = True) -> DeviceCopy:
        """Return the copy of `slab`, whose bytes are in memory."""
        copy = self.room.copies.get(slab)
        if copy is None:
            copy = self.room.copies[slab] = DeviceCopy(self.compute, self._lease_of(slab))
        self.compute.follow()
        return copy

    def _lease_of(self, slab: Slab) -> _native.DeviceLease:
        for arena in self._over:
            offset = slab.address - arena.address
            if 0 <= offset < arena.usage()["budget"]:
                lease = arena.try_allocate_at(offset, slab.nbytes, slab.name)
                if lease is not None:
                    return lease
        raise OffloadError(f"{slab.name} is in no memory of the device's (internal error)")

    def prefetch(self, slab: Slab, use: int) -> bool:
        """Start reading `slab`, if it is on disk, for use number `use` from now."""
        return self._mover.prefetch(slab, use)

    def drop(self, slab: Slab) -> None:
        """What the compute has made of `slab` is not needed; its memory stays."""
        copy = self.room.copies.get(slab)
        if copy is not None:
            copy.ahead = False

    # -- the host's turn --------------------------------------------------------------------------

    def settle(self, slab: Slab) -> None:
        """The bytes of `slab` are about to be changed by the host: let the compute's uses end."""
        copy = self.room.copies.get(slab)
        if copy is not None:
            copy.lease.wait_for_uses()
        if slab.lease is not None:
            self.device.use_host(slab.lease, "write", slab.name)

    def in_flight(self, slab: Slab) -> Sequence[Arrival]:
        """Return nothing: what has to end is work of the compute's, and is waited for here."""
        self.settle(slab)
        return ()

    def is_reading(self, slab: Slab) -> bool:
        """Whether the compute uses the memory of `slab`, or has made more of it than was sent."""
        copy = self.room.copies.get(slab)
        return copy is not None and (copy.ahead or not copy.lease.is_idle())

    def end_one(self) -> bool:
        """See the compute's use of one slab that nobody holds end; False when there is none."""
        for lease, host in self._parting:
            if not lease.is_open:
                lease.wait_for_uses()
                self._parting.remove((lease, host))
                return True
        for slab, copy in self.room.copies.items():
            idle = slab.locks or slab.pinned or copy.ahead or copy.lease.is_open
            if not idle and not copy.lease.is_idle():
                copy.lease.wait_for_uses()
                return True
        return False

    def leave(self, slab: Slab) -> None:
        """The slab is about to give up its memory, which is kept for as long as it is in use."""
        copy = self.room.copies.pop(slab, None)
        self._parting = [pair for pair in self._parting if not pair[0].is_idle()]
        if copy is None or slab.lease is None:
            return
        if not copy.lease.is_idle():
            self._parting.append((copy.lease, slab.lease))
            return
        self.device.use_host(slab.lease, "write", slab.name)

    def check_room(self, slabs: Sequence[Slab], what: str) -> None:
        """There is as much room as in host memory, where it is found when they are fetched."""

    def close(self) -> None:
        """Wait for what is in flight and give up everything."""
        super().close()
        self._parting.clear()
