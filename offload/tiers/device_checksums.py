"""Checksums of copies on a device: that they arrive as they were, and that nothing changes them.

With ``Policy(debug=True)``:
 1. when the compute stream may use a copy that has arrived, its CRC32C is noted. While the host
    slab holds the same, its bytes must have it too.
 2. when a copy goes home, what arrives there must have the CRC32C that it has here (the host's half
    of it is in checksums.py).
 3. when a copy is given up that nobody has said was changed, it must have the one that was noted.
Each is a copy of the bytes to the host, which waits for the compute stream.
"""

from __future__ import annotations

import torch

from offload import _native
from offload.errors import CorruptionError
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.device_copy import DeviceCopy
from offload.tiers.slab import Residency, Slab

_CHUNK = 8 << 20
"""Bytes that are in ordinary host memory at once, outside of the budget."""


class DeviceChecksums:
    """What the copies on one device held when the compute began to use them."""

    def __init__(self, enabled: bool, compute: ComputeDevice) -> None:
        """Note nothing where they are not `enabled`."""
        self._enabled = enabled
        self._compute = compute

    def note_arrival(self, slab: Slab, copy: DeviceCopy) -> None:
        """The compute stream waits for the copy of `slab`, which is current.

        Raises:
            CorruptionError: host memory holds other bytes.
        """
        if not self._enabled:
            return
        copy.checksum = self._of(slab, copy)
        if slab.residency is not Residency.HOST or slab.lease is None:
            return
        there = _native.crc32c(slab.lease, slab.nbytes)
        if there != copy.checksum:
            raise CorruptionError(
                f"{slab.name} ({slab.kind}) has arrived on {self._compute.name} with the CRC32C "
                f"{copy.checksum:08x}, and is {there:08x} in host memory"
            )

    def note_departure(self, slab: Slab, copy: DeviceCopy) -> int | None:
        """Return what the host is to receive of the copy, which is about to go home."""
        if self._enabled:
            copy.checksum = self._of(slab, copy)
        return copy.checksum

    def verify(self, slab: Slab, copy: DeviceCopy) -> None:
        """The copy is given up.

        Raises:
            CorruptionError: it holds other bytes than it should.
        """
        noted, copy.checksum = copy.checksum, None
        if noted is None or copy.ahead:
            return
        found = self._of(slab, copy)
        if found != noted:
            raise CorruptionError(
                f"the copy of {slab.name} ({slab.kind}) on {self._compute.name} changed while "
                f"nobody said so (CRC32C {noted:08x}, now {found:08x}): the change would have been "
                "lost; what writes to a parameter past torch (a raw pointer, an extension, a view "
                "kept from an earlier step) has to do so inside offload.materialize()"
            )

    def _of(self, slab: Slab, copy: DeviceCopy) -> int:
        checksum = 0
        for begin in range(0, slab.nbytes, _CHUNK):
            count = min(_CHUNK, slab.nbytes - begin)
            part = self._compute.tensor(
                copy.lease, begin, (count,), (1,), torch.uint8, access="read"
            ).cpu()
            checksum = _native.crc32c_at(part.data_ptr(), count, checksum)
        return checksum
