"""DeviceCopy: a slab's bytes on the device."""

from __future__ import annotations

import torch

from offload import _native
from offload.tiers.compute_device import ComputeDevice


class DeviceCopy:
    """A slab's bytes on the device.

    Attributes:
        lease: their memory.
        arrival: the copy to the device that the compute stream does not wait for yet.
        departure: the copy to the host that it does not wait for yet, before it changes the bytes.
        ahead: the copy is newer than the host slab.
        checksum: what it holds unless it is ahead, where that is known (device_checksums.py).
    """

    def __init__(self, compute: ComputeDevice, lease: _native.DeviceLease) -> None:
        """Hold nothing yet."""
        self._compute = compute
        self.lease = lease
        self.arrival: _native.DeviceTransfer | None = None
        self.departure: _native.DeviceTransfer | None = None
        self.ahead = False
        self.checksum: int | None = None

    def view(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a tensor over the copy, as ``Slab.view`` does: a use by the compute stream."""
        return self._compute.tensor(self.lease, offset, shape, stride, dtype)
