"""ScratchMemory: memory for tensors whose bytes lie in an unnamed file, in RAM only while used.

Regions of one file are mapped shared, so a tensor in one is an ordinary tensor: any operator works
on it, and so does code that takes its address. What keeps RAM small:
 1. a region's space in the file is reserved first: a full disk is an error, not a SIGBUS.
 2. regions are counted as resident from their use on. Beyond the window, the ones used longest ago
    are written to the file and their pages given up; a later access pages them in again.
 3. the space of a region goes back to the disk when the last tensor in it goes.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from offload.errors import PolicyError, SwapIOError, SwapSpaceError

_PAGE = mmap.PAGESIZE
_SEGMENT_BYTES = 256 << 20
"""Mapped at once. Each mapping takes a file descriptor; address space costs nothing."""
_IN_MEMORY = ("tmpfs", "ramfs")


class Region:
    """A range of a segment that holds one tensor's storage.

    Attributes:
        memory: of whom it is.
        nbytes: whole pages.
    """

    __slots__ = ("__weakref__", "_mapped", "_start", "file_offset", "memory", "nbytes")

    def __init__(
        self, memory: ScratchMemory, mapped: mmap.mmap, start: int, nbytes: int, file_offset: int
    ) -> None:
        """A range at `start` of the segment `mapped`."""
        self.memory = memory
        self._mapped = mapped
        self._start = start
        self.nbytes = nbytes
        self.file_offset = file_offset

    def view(self) -> memoryview:
        """Return its bytes; whoever has a view of them keeps the segment mapped."""
        return memoryview(self._mapped)[self._start : self._start + self.nbytes]

    def write_out(self) -> None:
        """Have the bytes in the file, and give up the pages. Raises OSError."""
        self._mapped.flush(self._start, self.nbytes)
        self._mapped.madvise(mmap.MADV_DONTNEED, self._start, self.nbytes)

    def discard(self) -> None:
        """Give up the bytes: the file's space goes back where the filesystem can punch holes."""
        try:
            self._mapped.madvise(mmap.MADV_REMOVE, self._start, self.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor with a storage of its own in CPU memory."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not value.is_quantized
    )


_regions: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
"""By the address of their first byte. A tensor's buffer, kept by torch, keeps its region."""


def region_of(tensor: torch.Tensor) -> Region | None:
    """Return the region that the storage of `tensor` is; None: it is other memory, or none."""
    if not is_plain(tensor):
        return None
    return _regions.get(tensor.untyped_storage().data_ptr())


class ScratchMemory:
    """Regions of one unnamed file. Not thread-safe.

    Attributes:
        fd: of the file; it is closed when neither this nor a region is left.
        folder: where the file is.
    """

    def __init__(self, folder: str, window_bytes: int) -> None:
        """Open the file in `folder`; keep about `window_bytes` of it in RAM at once.

        Raises:
            SwapIOError: there can be no file.
        """
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self.fd = os.dup(file.fileno())
        except OSError as error:
            raise _as_swap_error(error, folder) from error
        weakref.finalize(self, os.close, self.fd)
        self.folder = folder
        self._window = window_bytes
        self._process = os.getpid()
        self._segment: mmap.mmap | None = None
        self._segment_offset = self._used = self._end = 0
        self._resident: dict[Region, None] = {}  # the one used longest ago first
        self._resident_bytes = 0

    def storage(self, nbytes: int) -> torch.UntypedStorage:
        """Return a storage of `nbytes` (at least one), which are zero.

        Raises:
            SwapSpaceError: the disk has no room.
            SwapIOError: it refuses for another reason.
        """
        size = max(1, -(-nbytes // _PAGE)) * _PAGE
        try:
            region = self._region(size)
        except OSError as error:
            raise _as_swap_error(error, self.folder) from error
        view = region.view()
        # The buffer is all that torch keeps: with it goes the region, and its space.
        ending = weakref.finalize(view, self._end_of, region)
        ending.atexit = False
        storage = torch.frombuffer(view, dtype=torch.uint8, count=max(1, nbytes)).untyped_storage()
        _regions[storage.data_ptr()] = region
        self.use([region])
        return storage

    def use(self, regions: Iterable[Region]) -> None:
        """Note that `regions` are about to be used together; others may have to leave RAM."""
        kept = set(regions)
        for region in kept:
            if self._resident.pop(region, region) is region:
                self._resident_bytes += region.nbytes
            self._resident[region] = None
        for region in list(self._resident):
            if self._resident_bytes <= self._window or region in kept:
                return
            self._write_out(region)

    def write_out(self) -> None:
        """Have all that is resident leave RAM."""
        for region in list(self._resident):
            self._write_out(region)

    def _region(self, size: int) -> Region:
        if self._segment is None or self._used + size > len(self._segment):
            length = max(size, _SEGMENT_BYTES)
            os.ftruncate(self.fd, self._end + length)
            self._segment = mmap.mmap(self.fd, length, offset=self._end)
            self._segment_offset, self._used = self._end, 0
            self._end += length
        start, offset = self._used, self._segment_offset + self._used
        os.posix_fallocate(self.fd, offset, size)
        self._used += size
        return Region(self, self._segment, start, size, offset)

    def _write_out(self, region: Region) -> None:
        try:
            region.write_out()
            os.posix_fadvise(self.fd, region.file_offset, region.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise _as_swap_error(error, self.folder) from error
        self._leave(region)

    def _leave(self, region: Region) -> None:
        if self._resident.pop(region, region) is None:
            self._resident_bytes -= region.nbytes

    def _end_of(self, region: Region) -> None:
        self._leave(region)
        if os.getpid() == self._process:  # a forked child shares the parent's bytes
            region.discard()


def scratch_folder(folder: str | None) -> str:
    """Return where a scratch file goes: `folder`, or the system's place for large ones.

    Raises:
        PolicyError: none was given, and the system's place is in memory.
    """
    if folder is not None:
        return folder
    default = "/var/tmp"
    if not Path(default).is_dir() or _filesystem(default) in _IN_MEMORY:
        raise PolicyError(
            f"deferred_init(): {default} is no folder on a disk; name one with "
            "deferred_init(swap_dir=...)"
        )
    return default


def _filesystem(folder: str) -> str:
    """The kind of filesystem `folder` is on, "" where the kernel does not say."""
    device = os.stat(folder).st_dev  # noqa: PTH116  (of the folder, as mountinfo numbers it)
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return ""


def _as_swap_error(error: OSError, folder: str) -> SwapIOError | SwapSpaceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SwapSpaceError(
            error.errno, "no space for the parameters of a deferred model", folder
        )
    return SwapIOError(error.errno, f"a scratch file: {error.strerror}", folder)
