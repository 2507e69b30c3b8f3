"""Where slabs go in device memory when their lifetimes are known: a pure function.

Slabs that are never in memory at once may share bytes. Placing them so that the memory needed is
least is NP-hard (dynamic storage allocation). Here each slab goes to the lowest place that is free
all its life, the largest slab first: what is hard to place is placed while there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import PolicyError

LEASE_BYTES = 512
"""Device leases start at multiples of this, and are as long."""


@dataclass(frozen=True)
class Lifetime:
    """The life of one slab: `nbytes` from its `first` use to its `last`, both included."""

    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class DeviceOffsets:
    """Where each slab goes, in bytes, and the memory that they need together."""

    offsets: tuple[int, ...]
    nbytes: int


def rounded(nbytes: int) -> int:
    """Return the bytes that a lease of `nbytes` takes."""
    return -(-nbytes // LEASE_BYTES) * LEASE_BYTES


def least_bytes(lifetimes: Sequence[Lifetime]) -> int:
    """Return the most bytes alive at once: no placement needs less."""
    changes: dict[int, int] = {}
    for life in lifetimes:
        changes[life.first] = changes.get(life.first, 0) + rounded(life.nbytes)
        changes[life.last + 1] = changes.get(life.last + 1, 0) - rounded(life.nbytes)
    alive = most = 0
    for time in sorted(changes):
        alive += changes[time]
        most = max(most, alive)
    return most


def device_offsets(lifetimes: Sequence[Lifetime]) -> DeviceOffsets:
    """Return an offset for each slab such that no two share a byte while both are alive.

    Raises:
        PolicyError: a slab has no bytes, or its last use is before its first.
    """
    for i, life in enumerate(lifetimes):
        if life.nbytes <= 0 or life.last < life.first:
            raise PolicyError(
                f"slab {i}: {life.nbytes} bytes from use {life.first} to use {life.last}; it needs "
                "at least one byte, and a last use that is not before the first"
            )
    # Of equal sizes the longest life, then the earliest: neighbours in time end up side by side.
    order = sorted(
        range(len(lifetimes)),
        key=lambda i: (
            -rounded(lifetimes[i].nbytes),
            lifetimes[i].first - lifetimes[i].last,
            lifetimes[i].first,
        ),
    )
    placed: list[tuple[int, int, Lifetime]] = []  # (begin, end, life), by begin
    offsets = [0] * len(lifetimes)
    for i in order:
        life = lifetimes[i]
        need = rounded(life.nbytes)
        begin = 0
        for other_begin, other_end, other in placed:
            if other.last < life.first or life.last < other.first:
                continue
            if begin + need <= other_begin:
                break
            begin = max(begin, other_end)
        offsets[i] = begin
        placed.append((begin, begin + need, life))
        placed.sort(key=lambda slab: slab[:2])
    return DeviceOffsets(tuple(offsets), max((end for _, end, _ in placed), default=0))
