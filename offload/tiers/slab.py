"""Slab: contiguous bytes of one unit (its parameters, its gradients, or one optimizer moment)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch

from offload import _native
from offload.errors import OffloadError


class Residency(Enum):
    """Where the current bytes of a slab are."""

    ABSENT = "absent"
    """Nowhere: nothing was stored yet, or what was stored has been given up."""
    DISK = "disk"
    HOST = "host"
    """In host memory; a copy on disk is current too unless the slab is dirty."""


class Slab:
    """State of one slab. Only the Mover changes it.

    Attributes:
        nbytes: bytes in use; memory for it is leased in whole pages.
        pinned: stays in host memory for good once it is there.
        locks: how many users hold it in memory at the moment.
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
        self.lease: _native.Lease | None = None
        self.base: torch.Tensor | None = None
        self.pending: _native.Transfer | None = None
        self.pending_write = False

    @property
    def wanted(self) -> bool:
        """Whether the content still means anything to anybody."""
        return self.live is None or self.live()

    def set_lease(self, lease: _native.Lease) -> None:
        """Take memory; its content is undefined."""
        self.lease = lease
        self.base = torch.frombuffer(lease, dtype=torch.uint8)

    def drop_lease(self) -> None:
        """Give the memory up; it returns to the arena when no tensor refers to it any more."""
        self.lease = None
        self.base = None

    def view(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a tensor over the slab's memory.

        Args:
            offset: byte offset in the slab.
            shape: in elements.
            stride: in elements.
            dtype: of the tensor.
        """
        if self.base is None:
            raise OffloadError(f"{self.name} is not in memory (internal error)")
        numel = 1
        for size in shape:
            numel *= size
        flat = self.base[offset : offset + numel * dtype.itemsize].view(dtype)
        return flat.as_strided(shape, stride)
