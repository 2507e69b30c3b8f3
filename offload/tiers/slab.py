"""Slab: contiguous bytes of one unit (its parameters, its gradients, or one optimizer moment)."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import torch

from offload import _native
from offload.errors import OffloadError
from offload.tiers.blocks import SlabBlocks

Arrival = _native.Transfer | _native.DeviceTransfer
"""Bytes in flight to or from a slab."""


class Residency(Enum):
    """Where the current bytes of a slab are."""

    ABSENT = "absent"
    """Nowhere: nothing was stored yet, or what was stored has been given up."""
    DISK = "disk"
    HOST = "host"
    """In host memory; a copy on disk is current too unless the slab is dirty."""
    PARTIAL = "partial"
    """On disk, and some blocks of them in host memory too. The others' memory holds anything."""


class Slab:
    """State of one slab. Only the Mover changes it.

    Attributes:
        nbytes: bytes in use; memory for it is leased in whole pages.
        pinned: stays in host memory for good once it is there.
        locks: how many users hold it in memory at the moment.
        source: files that it is read from instead of the swap store, as long as it is not changed.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        nbytes: int,
        pinned: bool,
        swap_object: int | None,
        live: Callable[[], bool] | None = None,
    ) -> None:
        """Describe a slab that holds nothing yet.

        `live` tells whether anybody still wants the content; None: always.
        """
        self.name = name
        self.kind = kind
        self.nbytes = nbytes
        self.pinned = pinned
        self.swap_object = swap_object
        self.live = live
        self.residency = Residency.ABSENT
        self.dirty = False
        self.locks = 0
        self.source: _native.FileRanges | None = None
        self.lease: _native.Lease | None = None
        """Its memory. Dropped here, it returns to the arena when no tensor refers to it either."""
        self.blocks: SlabBlocks | None = None
        """Which of them are in memory, while it is PARTIAL or about to be."""
        self.pending: Arrival | None = None
        self.pending_write = False
        self.changed_in_flight = False

    @property
    def wanted(self) -> bool:
        """Whether the content still means anything to anybody."""
        return self.live is None or self.live()

    @property
    def address(self) -> int:
        """Of its memory."""
        if self.lease is None:
            raise OffloadError(f"{self.name} is not in memory (internal error)")
        return self.lease.address

    def view(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a tensor over the slab's memory, with a storage of its own.

        Args:
            offset: byte offset in the slab.
            shape: in elements.
            stride: in elements; no element twice, none left out.
            dtype: of the tensor.
        """
        if self.lease is None:
            raise OffloadError(f"{self.name} is not in memory (internal error)")
        numel = math.prod(shape)
        if numel == 0:
            return torch.empty_strided(shape, stride, dtype=dtype)
        flat = torch.frombuffer(self.lease, dtype=dtype, count=numel, offset=offset)
        return flat.as_strided(shape, stride)

    def zero(self) -> None:
        """Fill the slab's memory with zero bytes."""
        self.view(0, (self.nbytes,), (1,), torch.uint8).zero_()
