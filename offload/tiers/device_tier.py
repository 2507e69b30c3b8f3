"""DeviceTier: copies of slabs on a device, where the compute uses them.

Protocol of a copy:
 1. fetch: the host slab's bytes are copied to the device, and the compute stream waits for that;
    the host does not. prefetch starts the same earlier.
 2. the home of the bytes stays the host slab. What the compute changes in a copy of parameters is
    pulled back before anybody else looks (pull); gradients are gathered in a copy that is newer
    than the slab until it is spilled to it, and to disk from there, without Python.
 3. before host bytes are changed, a copy of them that is still on its way is waited for (settle),
    and then the copy is not current any more (forget).
 4. a copy that nobody holds, by a lock on its slab, is dropped when its place is needed, the one
    needed farthest in the future first. Tensors on it keep its memory for as long as they live.
Slabs of units that are in use while others come and go have a place of their own (home), so that
they do not fragment the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from offload import _native
from offload.errors import BudgetError, OffloadError
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.mover import NEVER, Mover
from offload.tiers.slab import Residency, Slab

COPY = "copy to the device"
"""Under which waiting for one from host memory is counted."""


class DeviceCopy:
    """A slab's bytes on the device.

    Attributes:
        lease: their memory.
        arrival: the copy to the device that the compute stream does not wait for yet.
        ahead: the copy is newer than the host slab.
    """

    def __init__(self, compute: ComputeDevice, lease: _native.DeviceLease) -> None:
        """Hold nothing yet."""
        self._compute = compute
        self.lease = lease
        self.arrival: _native.DeviceTransfer | None = None
        self.ahead = False

    def view(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a tensor over the copy, as ``Slab.view`` does: a use by the compute stream."""
        return self._compute.tensor(self.lease, offset, shape, stride, dtype)


class DeviceTier:
    """The device memory of one wrapped model. Not thread-safe: the owner serialises.

    Attributes:
        device: the core's.
        next_use: position of each slab's next use among the predicted uses.
        relieve: makes a user of memory let go; False when there is none.
    """

    def __init__(
        self,
        compute: ComputeDevice,
        home: _native.DeviceArena | None,
        ring: _native.DeviceArena,
        mover: Mover,
    ) -> None:
        """Copy slabs of `mover`, whose arenas are pinned for the device."""
        self._compute = compute
        self.device = compute.native
        self.home = home
        self.ring = ring
        self.next_use: dict[Slab, int] = {}
        self.relieve: Callable[[], bool] = lambda: False
        self._mover = mover
        self._transfers = _native.DeviceTransfers(self.device)
        self._copies: dict[Slab, DeviceCopy] = {}
        self._reading: dict[Slab, _native.DeviceTransfer] = {}
        """Copies to the device that may still read host memory, oldest first."""
        self._at_home: set[Slab] = set()
        mover.readers = self

    def keep_at_home(self, slab: Slab) -> None:
        """Give `slab` its place in the home whenever it is copied."""
        self._at_home.add(slab)

    # -- to the device ----------------------------------------------------------------------------

    def fetch(self, slab: Slab) -> DeviceCopy:
        """Return the current bytes of `slab`, which is locked, ready for the compute stream."""
        copy = self._copies.get(slab)
        if copy is None:
            self._mover.fetch(slab)
            copy = self._start(slab, self._take(slab))
        if copy.arrival is not None:
            self._compute.follow()
            copy.arrival.wait_stream("compute")
            copy.arrival = None
        return copy

    def prefetch(self, slab: Slab, use: int) -> bool:
        """Start copying `slab`, if its bytes are in host memory, for use number `use` from now.

        Returns False when there is no room that may be taken.
        """
        if slab in self._copies or slab.residency is not Residency.HOST:
            return True
        if slab.pending is not None and not slab.pending_write:
            return True  # on its way to host memory
        lease = self._try_take(slab, farther_than=use)
        if lease is None:
            return False
        self._start(slab, lease)
        return True

    def hold_new(self, slab: Slab) -> DeviceCopy:
        """Return memory for `slab`, which is locked, to be filled by the compute stream."""
        copy = self._copies.get(slab)
        if copy is None:
            copy = self._copies[slab] = DeviceCopy(self._compute, self._take(slab))
            self._compute.follow()
            copy.lease.acquire("compute")
        return copy

    def copy_of(self, slab: Slab) -> DeviceCopy | None:
        """Return the copy of `slab`, if there is one."""
        return self._copies.get(slab)

    def _start(self, slab: Slab, lease: _native.DeviceLease) -> DeviceCopy:
        if slab.lease is None:
            raise OffloadError(f"{slab.name} is not in host memory (internal error)")
        copy = DeviceCopy(self._compute, lease)
        copy.arrival = self._transfers.fetch(lease, slab.lease, slab.nbytes)
        self._copies[slab] = copy
        self._reading.pop(slab, None)
        self._reading[slab] = copy.arrival
        return copy

    # -- to the host ------------------------------------------------------------------------------

    def pull(self, slab: Slab) -> None:
        """Have the slab, and its place on disk, hold what the compute has made of a copy.

        Waits for it: tensors on the copy are in use, and may be changed again.
        """
        copy = self._copies.get(slab)
        if copy is None:
            raise OffloadError(f"{slab.name} is not on the device (internal error)")
        self._send(slab, copy, to_disk=True)
        self._mover.settle(slab)

    def spill(self, slab: Slab, to_disk: bool) -> None:
        """Send a copy that is ahead home, to the slab's place on disk too, and give it up."""
        copy = self._copies.get(slab)
        if copy is not None and copy.ahead:
            self._send(slab, copy, to_disk)
            self._copies.pop(slab, None)

    def _send(self, slab: Slab, copy: DeviceCopy, to_disk: bool) -> None:
        """Start copying to the slab, and on from there; nothing waits for it here."""
        self._compute.follow()
        computed = self.device.record("compute")
        on_disk = to_disk and slab.swap_object is not None
        store, swap_object = (self._mover.store, slab.swap_object) if on_disk else (None, None)

        def start(via: _native.Lease) -> partial[_native.DeviceTransfer]:
            return partial(
                self._transfers.spill,
                copy.lease,
                via,
                slab.nbytes,
                after=computed,
                store=store,
                object=swap_object or 0,
            )

        self._mover.receive(slab, start, on_disk)

    # -- changes of the host slab -----------------------------------------------------------------

    def settle(self, slab: Slab) -> None:
        """The host bytes of `slab` are about to be changed: let copies of the old ones end."""
        if self.is_reading(slab):
            self._mover.wait(self._reading[slab], COPY)
            del self._reading[slab]
        if slab.lease is not None:
            self.device.use_host(slab.lease, "write", slab.name)

    def is_reading(self, slab: Slab) -> bool:
        """Whether a copy from the memory of `slab` is in flight."""
        transfer = self._reading.get(slab)
        if transfer is not None and transfer.done():
            del self._reading[slab]
        return slab in self._reading

    def end_one(self) -> bool:
        """Wait for the oldest copy from host memory in flight; False when there is none."""
        for slab in list(self._reading):
            if self.is_reading(slab):
                self.settle(slab)
                return True
        return False

    def forget(self, slab: Slab) -> None:
        """The copy of `slab` is not current any more."""
        self.settle(slab)
        self._copies.pop(slab, None)

    # -- memory -----------------------------------------------------------------------------------

    def _take(self, slab: Slab) -> _native.DeviceLease:
        while True:
            lease = self._try_take(slab, farther_than=None)
            if lease is not None:
                return lease
            if not self.relieve():
                raise self._no_room(slab)

    def _try_take(self, slab: Slab, farther_than: int | None) -> _native.DeviceLease | None:
        arena = self.home if slab in self._at_home and self.home is not None else self.ring
        while True:
            lease = arena.try_allocate(slab.nbytes, slab.name)
            if lease is not None:
                return lease
            victim = self._victim(farther_than)
            if victim is None:
                return None
            del self._copies[victim]

    def _victim(self, farther_than: int | None) -> Slab | None:
        """The slab whose copy to give up: held by nobody, not ahead, needed last."""
        best, best_use = None, -1 if farther_than is None else farther_than
        for slab, copy in self._copies.items():
            if slab.locks or copy.ahead or slab in self._at_home:
                continue
            use = self.next_use.get(slab, NEVER)
            if use > best_use:
                best, best_use = slab, use
        return best

    def _no_room(self, slab: Slab) -> BudgetError:
        usage = self.ring.usage()
        held = [f"{s.name} ({s.nbytes} bytes)" for s in self._copies if s.locks]
        return BudgetError(
            f"no room for {slab.name} on the device: {slab.nbytes} bytes are needed, of "
            f"{usage['budget']} bytes {usage['budget'] - usage['in_use']} are free (longest range "
            f"{usage['largest_free']}); in use at this moment: {', '.join(held) or 'nothing'}; "
            "raise Budget(device=...)"
        )

    def check_room(self, slabs: Sequence[Slab], what: str) -> None:
        """Raise BudgetError when `slabs` can never be on the device together."""
        needed = sum(slab.nbytes for slab in slabs if slab not in self._at_home)
        room = self.ring.usage()["budget"]
        if needed > room:
            raise BudgetError(
                f"{what} cannot be on the device as a whole: its parameters need {needed} bytes, "
                f"and {room} of the device budget are for what comes and goes; materialize() one "
                "of its modules at a time, or raise Budget(device=...)"
            )

    def counters(self) -> dict[str, int]:
        """Return what the device's arenas hold at the moment, in bytes, and what was copied."""
        usages = [arena.usage() for arena in (self.home, self.ring) if arena is not None]
        stats = self.device.stats()
        return {
            "device_budget_bytes": sum(usage["budget"] for usage in usages),
            "device_in_use_bytes": sum(usage["in_use"] for usage in usages),
            "device_peak_bytes": sum(usage["peak"] for usage in usages),
            "to_device_bytes": stats["h2d_bytes"],
            "to_host_bytes": stats["d2h_bytes"],
            "device_host_waits": stats["host_waits"],
        }

    def close(self) -> None:
        """Wait for what is in flight and give up all copies."""
        self._copies.clear()
        self.device.drain()
