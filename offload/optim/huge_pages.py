"""Huge pages under memory that others have allocated."""

from __future__ import annotations

import ctypes
import sys

import torch

_MADV_COLLAPSE = 25  # <linux/mman.h>; since Linux 6.1
_HUGE_PAGE = 2 << 20


def collapse(tensor: torch.Tensor) -> int:
    """Have the kernel put what it can of a dense CPU tensor's memory on huge pages, now.

    An update streams over parameters, and a core prefetches no further than the end of a page. The
    bytes and their addresses stay, no memory is added, and only ranges of 2 MiB that lie wholly
    inside of the tensor are asked for. Takes about as long as copying the tensor once.

    Returns:
        Bytes that are on huge pages now; 0 where the kernel cannot or may not: nothing was changed
        then, and the update is only slower.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return 0
    begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end <= begin:
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return end - begin if madvise(begin, end - begin, _MADV_COLLAPSE) == 0 else 0
