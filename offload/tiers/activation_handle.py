"""Handle: what autograd holds in place of a saved tensor, and the range of bytes it stands for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from offload import _native
from offload.tiers.activation_range import span
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.slab import Slab


class SavedRange:
    """One copy: its slab, and the bytes of which storage it holds, at which version."""

    __slots__ = (
        *("address", "begin", "claim", "device", "end", "newer", "older", "sequence"),
        *("shift", "slab"),
        *("storage", "version", "witness"),
    )
    slab: Slab
    device: ComputeDevice | None  # that has the storage; None: it is in host memory
    sequence: int
    begin: int  # in bytes of the storage
    end: int
    shift: int  # where `begin` is in the slab
    address: int  # of the storage's memory
    storage: StorageWeakRef
    witness: torch.Tensor  # shares the version counter of the original, not its memory
    version: int
    claim: weakref.ref[Claim]
    older: SavedRange | None
    newer: SavedRange | None

    def serves(self, storage: torch.UntypedStorage, begin: int, end: int) -> bool:
        """Whether the copy has the current bytes [begin, end) of `storage`."""
        return (
            self.begin <= begin
            and end <= self.end
            and self.address == storage.data_ptr()
            and self.witness._version == self.version
        )


class Claim:
    """What all handles to one range share; the range is freed when it dies."""

    def __init__(self, discard: Callable[[SavedRange], None], saved: SavedRange) -> None:
        """Call `discard` with `saved` when nobody claims it any more."""
        self._discard = discard
        self.saved = saved

    def __del__(self) -> None:
        self._discard(self.saved)


@dataclass(frozen=True)
class Handle:
    """What autograd holds in place of a saved tensor."""

    claim: Claim
    offset: int  # in bytes of the slab
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    witness: torch.Tensor
    version: int

    def check_version(self) -> None:
        """Raise torch's RuntimeError when the original was changed in place since it was saved."""
        if self.witness._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{self.dtype} {list(self.shape)}] is at version "
                f"{self.witness._version}; expected version {self.version} instead"
            )

    def view_of(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the saved tensor over `memory`, bytes that its slab was copied to."""
        offset = self.offset // self.dtype.itemsize
        flat = torch.empty(0, dtype=self.dtype, device=memory.device)
        return flat.set_(memory.untyped_storage(), offset, self.shape, self.stride)

    def view(self, lease: _native.Lease) -> torch.Tensor:
        """Return the saved tensor over the memory of its slab."""
        count = span(self.shape, self.stride)
        flat = torch.frombuffer(lease, dtype=self.dtype, count=count, offset=self.offset)
        return flat.as_strided(self.shape, self.stride)


def witness(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the version counter of `tensor` and without its memory."""
    found = tensor.detach()
    found.data = _NOTHING
    return found


_NOTHING: Any = torch.empty(0)
