"""Which bytes of its storage stand for a saved tensor."""

from __future__ import annotations

import torch

LEAST_STORAGE_BYTES = 64 << 10
"""Tensors in smaller storages are left alone: a transfer of them costs a request, as one of a
megabyte does, and saves next to nothing. Bytes."""

_MOST_GAPS = 4
"""A view with gaps is saved together with them while that is not more than so many times its own
bytes: q, k and v, which lie interleaved in one storage, are a third of it each."""


def byte_range(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return [begin, end) in bytes of the storage of `tensor` to save; None: leave it alone.

    A view without gaps is saved by itself. One with gaps is saved with its whole storage, so that
    the views in its gaps share the copy; where the storage is much larger, from its first to its
    last byte.
    """
    storage_bytes = tensor.untyped_storage().nbytes()
    if storage_bytes < LEAST_STORAGE_BYTES or tensor.numel() == 0:
        return None
    begin = int(tensor.storage_offset()) * tensor.itemsize
    spanned = span(tuple(tensor.shape), tensor.stride()) * tensor.itemsize
    if spanned <= tensor.nbytes:
        return begin, begin + spanned
    if storage_bytes <= _MOST_GAPS * tensor.nbytes:
        return 0, storage_bytes
    if spanned <= _MOST_GAPS * tensor.nbytes:
        return begin, begin + spanned
    return None


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements lie from the first to the last one of a view that is not empty."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
