"""What starts a read of a slab, whole or in blocks, from the swap store or from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offload import _native
from offload.errors import OffloadError
from offload.tiers.blocks import SlabBlocks
from offload.tiers.slab import Arrival, Residency, Slab


@dataclass(frozen=True)
class Read:
    """A read that can be started.

    Attributes:
        start: a C function, and its arguments.
        nbytes: that it reads.
        blocks: of a PARTIAL slab, that it brings.
    """

    start: Callable[..., Arrival]
    args: tuple[Any, ...]
    nbytes: int
    blocks: Sequence[int] = ()


def begin_partial(slab: Slab, store: _native.SwapStore | None) -> SlabBlocks:
    """Make `slab`, which has memory and is on disk, PARTIAL if it is not; return its blocks."""
    if slab.residency is Residency.PARTIAL and slab.blocks is not None:
        return slab.blocks
    if slab.source is not None:
        slab.blocks = SlabBlocks(slab.source.blocks)
    elif store is not None:
        slab.blocks = SlabBlocks.of_size(slab.nbytes, store.block_bytes)
    else:
        raise _no_place(slab)
    slab.residency = Residency.PARTIAL
    return slab.blocks


def whole_read(slab: Slab, store: _native.SwapStore | None, demand: bool) -> Read:
    """Return what reads all of `slab`, which has memory."""
    if slab.source is not None:
        return Read(slab.source.read, (slab.lease, demand), slab.nbytes)
    if store is None or slab.swap_object is None:
        raise _no_place(slab)
    args = (slab.swap_object, slab.lease, slab.nbytes, demand)
    return Read(store.read, args, slab.nbytes)


def blocks_read(
    slab: Slab, store: _native.SwapStore | None, blocks: Sequence[int], demand: bool
) -> Read:
    """Return what reads `blocks`, of which there are some, of `slab`, which is PARTIAL."""
    spans = [] if slab.blocks is None else slab.blocks.spans(blocks)
    nbytes = sum(end - begin for begin, end in spans)
    if slab.source is not None:
        return Read(slab.source.read_blocks, (slab.lease, spans, demand), nbytes, blocks)
    if store is None or slab.swap_object is None:
        raise _no_place(slab)
    args = (slab.swap_object, slab.lease, slab.nbytes, spans, demand)
    return Read(store.read_blocks, args, nbytes, blocks)


def _no_place(slab: Slab) -> OffloadError:
    return OffloadError(f"{slab.name} has no place on disk (internal error)")
