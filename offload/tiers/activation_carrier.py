"""ActivationCarrier: brings saved activations from a device to the arena, and back.

Protocol of a range:
 1. save: its bytes are copied to a slab in host memory, after the work of the compute stream that
    made them, and go on to disk if they must. The tensor's memory is borrowed: torch's allocator
    gets it back when the copy has ended. The host does not wait, but for memory of the arena: so
    what is in flight takes no more device memory than the arena has.
 2. bring: memory of torch's allocator is filled from the slab, or from disk through the slab's
    memory, after all that the compute stream was given before. A few ranges ahead of the backward.
 3. load: the compute stream waits for that copy; the host does not, unless it had to be read from
    disk and was not brought. While a tensor on it lives, the range is not copied again.
Host memory that a copy reads is not given up before its end (Readers). A simulated device copies
from and to torch's CPU tensors, as if they were its own memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from offload import _native
from offload.errors import OffloadError
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.device_tier import COPY
from offload.tiers.mover import Mover
from offload.tiers.slab import Arrival, Residency, Slab


@dataclass
class _Arrival:
    """A copy to the device that the compute stream does not wait for yet."""

    memory: torch.Tensor
    loan: _native.DeviceLoan
    transfer: _native.DeviceTransfer


class ActivationCarrier:
    """Copies between the devices of one model and the arena. Not thread-safe.

    Attributes:
        ahead_bytes: of device memory that was filled, or is, and not loaded yet.
    """

    def __init__(self, devices: Sequence[ComputeDevice], mover: Mover) -> None:
        """Carry slabs of `mover`, whose arena is pinned for all of `devices`."""
        self._mover = mover
        self._devices = list(devices)
        self._transfers = {
            device: _native.DeviceTransfers(device.native) for device in self._devices
        }
        self._arriving: dict[Slab, _Arrival] = {}
        self._there: dict[Slab, StorageWeakRef] = {}
        self._reading: dict[Slab, tuple[ComputeDevice, _native.DeviceTransfer]] = {}
        self._largest = 0
        self.ahead_bytes = 0
        mover.readers = self

    def device_of(self, tensor: torch.Tensor) -> ComputeDevice | None:
        """Return the device in whose memory `tensor` is; None: it is in host memory."""
        return next((d for d in self._devices if d.torch == tensor.device), None)

    # -- from the device --------------------------------------------------------------------------

    def save(
        self, device: ComputeDevice, slab: Slab, storage: torch.UntypedStorage, begin: int,
        to_disk: bool,
    ) -> None:  # fmt: skip
        """Start filling `slab`, a new one, from byte `begin` of `storage` on.

        Args:
            device: has the storage.
            slab: as long as what is copied.
            storage: of a tensor.
            begin: of what is copied.
            to_disk: it goes on to the slab's object.
        """
        device.follow()
        loan = _native.DeviceLoan(
            device.native, storage.data_ptr() + begin, slab.nbytes, storage, slab.name
        )
        store = self._mover.store if to_disk else None

        def start(via: _native.Lease) -> partial[_native.DeviceTransfer]:
            return partial(
                self._transfers[device].spill,
                loan,
                via,
                slab.nbytes,
                store=store,
                object=(slab.swap_object or 0) if to_disk else 0,
            )

        self._mover.receive(slab, start, to_disk)
        self._largest = max(self._largest, slab.nbytes)

    # -- to the device ----------------------------------------------------------------------------

    def may_bring(self, slab: Slab) -> bool:
        """Whether device memory may be taken for `slab` ahead of its use."""
        return slab in self._arriving or self.ahead_bytes + slab.nbytes <= 2 * self._largest

    def bring(self, device: ComputeDevice, slab: Slab, use: int) -> bool:
        """Start copying `slab` to `device`, from disk if need be, for use number `use` from now.

        Returns False when there is no room that may be taken.
        """
        if slab in self._arriving or self._found(slab, device) is not None:
            return True
        if slab.pending is not None and slab.pending.done():
            self._mover.poll()
        if slab.residency is Residency.HOST and slab.pending is None:
            self._start(device, slab)
            return True
        if slab.residency is not Residency.DISK or slab.pending is not None:
            return True  # on its way to host memory
        store, swap_object = self._mover.store, slab.swap_object
        if store is None or swap_object is None:
            raise OffloadError(f"{slab.name} has no place on disk (internal error)")
        memory, loan = self._borrow(device, slab)

        def start(via: _native.Lease) -> partial[_native.DeviceTransfer]:
            return partial(
                self._transfers[device].fetch,
                loan,
                via,
                slab.nbytes,
                store=store,
                object=swap_object,
            )

        transfer = self._mover.read_on(slab, start, use)
        if transfer is None:
            return False
        self._note(device, slab, _Arrival(memory, loan, transfer))
        return True

    def load(self, device: ComputeDevice, slab: Slab) -> torch.Tensor:
        """Return the bytes of `slab` in memory of `device`, ready for the compute stream."""
        found = self._found(slab, device)
        if found is not None:
            return found
        if slab not in self._arriving:
            self._mover.fetch(slab)
            self._start(device, slab)
        arrival = self._arriving.pop(slab)
        self.ahead_bytes -= slab.nbytes
        device.follow()
        begun = None if arrival.transfer.issued() else time.perf_counter()
        try:
            arrival.transfer.wait_stream("compute")
        except OffloadError:
            self._mover.settle(slab)  # it takes note of the failure, and raises it
            raise
        finally:
            if begun is not None:  # it still had to be read from disk
                self._mover.note_stall(slab.kind, time.perf_counter() - begun)
        arrival.loan.use("compute", "read")
        self._there[slab] = StorageWeakRef(arrival.memory.untyped_storage())  # type: ignore[no-untyped-call]
        return arrival.memory

    def forget(self, slab: Slab) -> None:
        """Nobody needs `slab` on its device any more."""
        if self._arriving.pop(slab, None) is not None:
            self.ahead_bytes -= slab.nbytes
        self._there.pop(slab, None)

    def _borrow(self, device: ComputeDevice, slab: Slab) -> tuple[torch.Tensor, _native.DeviceLoan]:
        device.follow()
        memory = torch.empty(slab.nbytes, dtype=torch.uint8, device=device.torch)
        loan = _native.DeviceLoan(device.native, memory.data_ptr(), slab.nbytes, memory, slab.name)
        return memory, loan

    def _start(self, device: ComputeDevice, slab: Slab) -> None:
        if slab.lease is None:
            raise OffloadError(f"{slab.name} is not in host memory (internal error)")
        memory, loan = self._borrow(device, slab)
        transfer = self._transfers[device].fetch(loan, slab.lease, slab.nbytes)
        self._note(device, slab, _Arrival(memory, loan, transfer))

    def _note(self, device: ComputeDevice, slab: Slab, arrival: _Arrival) -> None:
        self._arriving[slab] = arrival
        self._reading[slab] = device, arrival.transfer
        self.ahead_bytes += slab.nbytes

    def _found(self, slab: Slab, device: ComputeDevice) -> torch.Tensor | None:
        """Return what was loaded of `slab` while somebody still has it."""
        reference = self._there.get(slab)
        if reference is None:
            return None
        found: Any = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        storage: torch.UntypedStorage | None = found
        if storage is None:
            del self._there[slab]
            return None
        return torch.empty(0, dtype=torch.uint8, device=device.torch).set_(storage)

    # -- copies from host memory (Readers) --------------------------------------------------------

    def settle(self, slab: Slab) -> None:
        """Wait until no copy from `slab` is in flight: its bytes may be changed."""
        device, transfer = self._reading.get(slab, (None, None))
        if transfer is not None and not transfer.done():
            self._mover.wait(transfer, COPY)
        self._reading.pop(slab, None)
        if device is not None and slab.lease is not None:
            device.native.use_host(slab.lease, "write", slab.name)

    def in_flight(self, slab: Slab) -> Sequence[Arrival]:
        """Return the copy from `slab` in flight."""
        return [self._reading[slab][1]] if self.is_reading(slab) else []

    def is_reading(self, slab: Slab) -> bool:
        """Whether a copy from `slab` is in flight."""
        return slab in self._reading and not self._reading[slab][1].done()

    def leave(self, slab: Slab) -> None:
        """The slab gives up its memory, which no copy in flight uses."""

    def end_one(self) -> bool:
        """Wait for the oldest copy; False when there is none. One that has ended counts."""
        slab = next(iter(self._reading), None)
        if slab is None:
            return False
        self._mover.wait(self._reading[slab][1], COPY)
        del self._reading[slab]
        return True
