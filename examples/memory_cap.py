"""A hard limit on this process's own memory, and what the limit leaves for offload.

Nothing here imports torch, so that the limit stands before anything large is allocated.
Linux only: the limit is RLIMIT_DATA, which counts every private writable mapping, touched or not
(heap, anonymous mappings, thread stacks), and the measurements come from /proc/self/status.
"""

from __future__ import annotations

import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_RETURN_AT_ONCE = 128 * 1024
_RETURN_LARGEST = 2**20
_NEVER = 2**30


def parse_size(text: str) -> int:
    """Bytes of a size such as "1GiB", "512 MiB", "1.5GB" or "1000000".

    Raises ValueError for anything else, and for sizes below one byte.
    """
    stripped = text.strip()
    number = stripped.rstrip("BKMGTIbkmgti ")
    unit = stripped[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is not a size: write a number and B, KiB, MiB, GiB or TiB, as in '1GiB'"
        ) from None
    if size < 1:
        raise ValueError(f"{text!r} is not a size: it is less than one byte")
    return size


def format_size(size: float) -> str:
    """`size` bytes for a person: "1.00 GiB", "37.5 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


@dataclass(frozen=True)
class MemoryUse:
    """What the kernel says of this process, in bytes."""

    rss: int
    """Resident now, file-backed pages of shared libraries included (VmRSS)."""
    peak_rss: int
    """The highest `rss` since the program started (VmHWM)."""
    data: int
    """What RLIMIT_DATA counts now (VmData)."""


def memory_use() -> MemoryUse:
    """Reads /proc/self/status. Raises OSError where there is none."""
    fields: dict[str, int] = {}
    with Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM", "VmData"):
                fields[name] = int(value.split()[0]) * 1024
    return MemoryUse(rss=fields["VmRSS"], peak_rss=fields["VmHWM"], data=fields["VmData"])


def set_memory_cap(cap: int) -> None:
    """Limits this process to `cap` bytes for good: soft and hard RLIMIT_DATA.

    Also has glibc return every large block to the system at once, so that the parameters that
    wrapping moves away leave no holes in the heap. keep_freed_memory() ends that.

    Raises OSError if a smaller hard limit is already in force.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY and hard < cap:
        raise OSError(f"RLIMIT_DATA is already limited to {hard} bytes, less than the cap of {cap}")
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    _mallopt({_M_MMAP_THRESHOLD: _RETURN_AT_ONCE, _M_TRIM_THRESHOLD: _RETURN_AT_ONCE})


def keep_freed_memory() -> None:
    """From now on has glibc keep blocks of less than 1 MiB for the next tensor of that size.

    A training loop allocates the same activations in each micro-batch; mapping each anew costs a
    page fault per 4 KiB: for the 124m model 267 000 per micro-batch, and 37 000 with this.
    """
    _mallopt({_M_MMAP_THRESHOLD: _RETURN_LARGEST, _M_TRIM_THRESHOLD: _NEVER})


def _mallopt(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has no thresholds and always returns large blocks
        return
    for option, value in options.items():
        if mallopt(option, value) != 1:
            raise OSError(f"mallopt({option}, {value}) was refused")


@dataclass(frozen=True)
class MemoryPlan:
    """How a cap is divided; all in bytes. The parts add up to `cap`."""

    cap: int
    baseline: int
    activations: int
    working: int
    slack: int
    margin: int

    @property
    def arena(self) -> int:
        """What is left for offload's host budget; zero or less when the cap is too small."""
        return self.cap - self.baseline - self.activations - self.working - self.slack - self.margin

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) for the plan table."""
        return [
            ("interpreter + torch", self.baseline),
            ("activations", self.activations),
            ("gradients in flight", self.working),
            ("heap slack", self.slack),
            ("margin", self.margin),
            ("arena (host budget)", self.arena),
        ]


def derive_host_budget(cap: int, baseline: int, activations: int, working: int) -> MemoryPlan:
    """Divides `cap` bytes: what the process needs anyway comes first, the arena gets the rest.

    cap: the limit on the whole process.
    baseline: measured after imports and a small forward, backward and optimizer step, so that the
        libraries' own buffers and thread stacks exist; the larger of resident and mapped bytes,
        because the cap must hold for both.
    activations: what autograd keeps alive for one micro-batch at the end of its forward pass.
    working: gradients of one block, and of its activations, that exist outside the arena before
        they are accumulated into it.

    The slack, 70 % of the activations, is what glibc's heap holds beyond them when it keeps what is
    freed (see keep_freed_memory): 145 MiB for 206 MiB of activations of the 124m model.
    The margin is 4 % of the cap, at least 24 MiB, for heap fragmentation and thread stacks.
    """
    return MemoryPlan(
        cap=cap,
        baseline=baseline,
        activations=activations,
        working=working,
        slack=activations * 70 // 100,
        margin=max(24 * 2**20, cap // 25),
    )
