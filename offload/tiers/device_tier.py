"""DeviceTier: copies of slabs on a device, where the compute uses them.

Protocol of a copy:
 1. fetch: the host slab's bytes are copied to the device, and the compute stream waits for that;
    the host does not. prefetch starts the same earlier, from disk through the slab's memory where
    they are there, without Python between.
 2. the home of the bytes stays the host slab. What the compute makes in a copy (gradients, an
    update's results) is newer than the slab (ahead) until it is sent home, to the slab and to its
    place on disk, without Python (send). The copy stays; before it is changed again the compute
    stream waits until it has been copied. What users change in parameters is pulled back before
    anybody else looks (pull).
 3. before host bytes are changed, a copy of them that is still on its way is waited for (settle),
    and the copy, which is not current any more, is dropped.
 4. where a copy goes, and which is given up for it: device_room.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from offload import _native
from offload.errors import OffloadError
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.device_checksums import DeviceChecksums
from offload.tiers.device_copy import DeviceCopy
from offload.tiers.device_room import DeviceRoom
from offload.tiers.mover import Mover
from offload.tiers.slab import Arrival, Residency, Slab

COPY = "copy to the device"
"""Under which waiting for one from host memory is counted."""


class DeviceTier:
    """The device memory of one wrapped model. Not thread-safe: the owner serialises.

    Attributes:
        compute: the device.
        device: the core's.
        shares_memory: with the host.
        room: its memory, and the copies in it.
        others: devices that copy from and to the same host memory.
        name: of the device, for people.
    """

    shares_memory = False

    def __init__(
        self,
        compute: ComputeDevice,
        home: _native.DeviceArena | None,
        ring: _native.DeviceArena,
        mover: Mover,
        debug: bool = False,
    ) -> None:
        """Copy slabs of `mover`, whose arenas are pinned for the device."""
        self.compute = compute
        self.device = compute.native
        self.others: tuple[_native.Device, ...] = ()
        self.name = compute.name
        self._mover = mover
        self._checksums = DeviceChecksums(debug, compute)
        self._transfers = _native.DeviceTransfers(self.device)
        self.room = DeviceRoom(
            home,
            ring,
            compute.name,
            partial(self._wait_stream, stream="h2d"),
            self._checksums.verify,
        )
        self._reading: dict[Slab, _native.DeviceTransfer] = {}
        """Copies to the device that may still read host memory, oldest first."""

    def keep_at_home(self, slab: Slab) -> None:
        """Give `slab` its place in the home whenever it is copied."""
        self.room.keep_at_home(slab)

    # -- to the device ----------------------------------------------------------------------------

    def fetch(self, slab: Slab) -> DeviceCopy:
        """Return the current bytes of `slab`, which is locked, ready to be used and changed."""
        if slab not in self.room.copies:
            lease = self.room.take(slab)
            self._mover.fetch(slab)
            self._start(slab, lease)
        return self.ready(slab)

    def bring(self, slab: Slab) -> bool:
        """Have a copy of `slab`, of one that holds nothing too; False when there is no room now.

        Nobody is made to let go.
        """
        if slab in self.room.copies:
            return True
        lease = self.room.try_take(slab, farther_than=None)
        if lease is None:
            return False
        if slab.residency is Residency.ABSENT:
            self.compute.follow()
            lease.acquire("compute")
            self.room.copies[slab] = DeviceCopy(self.compute, lease)
            self.room.note_use(slab, made=True)
        else:
            self._mover.fetch(slab)
            self._start(slab, lease)
        return True

    def ready(self, slab: Slab, change: bool = True) -> DeviceCopy:
        """Return the copy of `slab` once the compute stream waits for what it has to.

        Args:
            slab: has a copy.
            change: the stream may change it.
        """
        copy = self.room.copies[slab]
        self.room.note_use(slab)
        self.compute.follow()
        if copy.arrival is not None:
            try:
                self._wait_stream(slab, copy.arrival, "compute")
            except OffloadError:
                del self.room.copies[slab]
                self._mover.settle(slab)  # it takes note of the failure, and raises it
                raise
            copy.arrival = None
            self._checksums.note_arrival(slab, copy)
        if change and copy.departure is not None:
            copy.departure.wait_stream("compute")
            copy.departure = None
        return copy

    def _wait_stream(
        self, slab: Slab, arrival: _native.DeviceTransfer, stream: _native.Stream
    ) -> None:
        if arrival.issued():
            arrival.wait_stream(stream)
            return
        begun = time.perf_counter()  # it still waits for the disk
        try:
            arrival.wait_stream(stream)
        finally:
            self._mover.note_stall(slab.kind, time.perf_counter() - begun)

    def prefetch(self, slab: Slab, use: int) -> bool:
        """Start copying `slab`, from disk if need be, for use number `use` from now.

        Returns False when there is no room that may be taken.
        """
        if slab in self.room.copies or slab.residency is Residency.ABSENT:
            return True
        if slab.pending is not None and not slab.pending_write:
            return True  # on its way to host memory
        if slab.residency is Residency.DISK and slab.source is not None:
            return self._mover.prefetch(slab, use)
        lease = self.room.try_take(slab, farther_than=use)
        if lease is None:
            return False
        if slab.residency is Residency.HOST:
            self._start(slab, lease)
            return True
        return self._start_from_disk(slab, lease, use)

    def hold_new(self, slab: Slab) -> DeviceCopy:
        """Return memory for `slab`, which is locked, to be filled by the compute stream."""
        if slab not in self.room.copies:
            self.room.copies[slab] = DeviceCopy(self.compute, self.room.take(slab))
            self.compute.follow()
            self.room.copies[slab].lease.acquire("compute")
        self.room.note_use(slab, made=True)
        return self.ready(slab)

    def copy_of(self, slab: Slab) -> DeviceCopy | None:
        """Return the copy of `slab`, if there is one."""
        return self.room.copies.get(slab)

    def _start(self, slab: Slab, lease: _native.DeviceLease) -> None:
        if slab.lease is None:
            raise OffloadError(f"{slab.name} is not in host memory (internal error)")
        self._announce(slab, slab.lease, "read")
        self._note(slab, lease, self._transfers.fetch(lease, slab.lease, slab.nbytes))

    def _start_from_disk(self, slab: Slab, lease: _native.DeviceLease, use: int) -> bool:
        store, swap_object = self._mover.store, slab.swap_object
        if store is None or swap_object is None:
            raise OffloadError(f"{slab.name} has no place on disk (internal error)")

        def start(via: _native.Lease) -> partial[_native.DeviceTransfer]:
            self._announce(slab, via, "write")
            return partial(
                self._transfers.fetch, lease, via, slab.nbytes, store=store, object=swap_object
            )

        arrival = self._mover.read_on(slab, start, use)
        if arrival is None:
            return False
        self._note(slab, lease, arrival)
        return True

    def _announce(self, slab: Slab, lease: _native.Lease, access: _native.Access) -> None:
        """Tell the checkers of other devices what this one is about to do with host memory.

        What they do with it must be known by the host to be over: no stream of theirs waits for
        one of this device.
        """
        for device in self.others:
            device.use_host(lease, access, slab.name)

    def _note(
        self, slab: Slab, lease: _native.DeviceLease, arrival: _native.DeviceTransfer
    ) -> None:
        copy = self.room.copies[slab] = DeviceCopy(self.compute, lease)
        copy.arrival = arrival
        self._reading.pop(slab, None)
        self._reading[slab] = arrival

    def note_renewed(self, slab: Slab) -> None:
        """The compute stream has given the copy what `slab` holds."""
        self._checksums.note_arrival(slab, self.room.copies[slab])

    # -- to the host ------------------------------------------------------------------------------

    def pull(self, slab: Slab) -> None:
        """Have the slab, and its place on disk, hold what the compute has made of a copy.

        Waits for it: tensors on the copy are in use, and may be changed again.
        """
        copy = self.room.copies.get(slab)
        if copy is None:
            raise OffloadError(f"{slab.name} is not on the device (internal error)")
        copy.ahead = True
        self.send(slab)
        self._mover.settle(slab)

    def send(self, slab: Slab, to_disk: bool = True) -> None:
        """Send a copy that is ahead home, to the slab's place on disk too; the copy stays.

        Nothing waits for it here.
        """
        copy = self.room.copies.get(slab)
        if copy is None or not copy.ahead:
            return
        self.compute.follow()
        computed = self.device.record("compute")
        on_disk = to_disk and slab.swap_object is not None
        store, swap_object = (self._mover.store, slab.swap_object) if on_disk else (None, None)

        def start(via: _native.Lease) -> partial[_native.DeviceTransfer]:
            self._announce(slab, via, "write")
            return partial(
                self._transfers.spill,
                copy.lease,
                via,
                slab.nbytes,
                after=computed,
                store=store,
                object=swap_object or 0,
            )

        # Its memory is about to be written, later, by the other stream.
        if self.is_reading(slab) and slab in self._reading:
            self._reading[slab].wait_stream("d2h")
        checksum = self._checksums.note_departure(slab, copy)
        copy.departure = self._mover.receive(slab, start, on_disk, checksum)
        copy.ahead = False

    def drop(self, slab: Slab) -> None:
        """Give up the copy of `slab`, if any: it is not current any more, or not needed."""
        copy = self.room.copies.pop(slab, None)
        self.room.places.note_change(slab)
        if copy is not None:
            self._checksums.verify(slab, copy)

    # -- changes of the host slab -----------------------------------------------------------------

    def settle(self, slab: Slab) -> None:
        """The host bytes of `slab` are about to be changed: let copies of the old ones end."""
        if self.is_reading(slab):
            self._mover.wait(self._reading[slab], COPY)
            del self._reading[slab]
        if slab.lease is not None:
            self.device.use_host(slab.lease, "write", slab.name)

    def in_flight(self, slab: Slab) -> Sequence[Arrival]:
        """Return the copy from the memory of `slab` in flight, for a native job to follow."""
        return [self._reading[slab]] if self.is_reading(slab) else []

    def is_reading(self, slab: Slab) -> bool:
        """Whether a copy from the memory of `slab` is in flight."""
        transfer = self._reading.get(slab)
        if transfer is not None and transfer.done():
            del self._reading[slab]
        return slab in self._reading

    def leave(self, slab: Slab) -> None:
        """The host slab gives up its memory; a copy that is current stays so."""

    def end_one(self) -> bool:
        """See the oldest copy from host memory end; False when there is none.

        One that has ended by itself counts: whoever asked may have found it in flight before.
        """
        slab = next(iter(self._reading), None)
        if slab is None:
            return False
        if self.is_reading(slab):
            self.settle(slab)
        return True

    # -- the whole ---------------------------------------------------------------------------------

    def check_room(self, slabs: Sequence[Slab], what: str) -> None:
        """Raise BudgetError when `slabs`, all used here, can never be on the device together."""
        self.room.check_room(slabs, what)

    def counters(self) -> dict[str, int]:
        """Return what the device's arenas hold at the moment, in bytes, and what was copied."""
        usages = [arena.usage() for arena in (self.room.home, self.room.ring) if arena is not None]
        stats = self.device.stats()
        return {
            "device_budget_bytes": sum(usage["budget"] for usage in usages),
            "device_in_use_bytes": sum(usage["in_use"] for usage in usages),
            "device_peak_bytes": sum(usage["peak"] for usage in usages),
            "to_device_bytes": stats["h2d_bytes"],
            "to_host_bytes": stats["d2h_bytes"],
            "device_host_waits": stats["host_waits"],
            "device_planned": self.room.places.planned,
            "device_searched": self.room.places.searched,
        }

    def close(self) -> None:
        """Wait for what is in flight and give up all copies."""
        self.room.copies.clear()
        self.device.drain()
