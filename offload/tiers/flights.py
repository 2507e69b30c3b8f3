"""Flights: transfers of slabs that are in flight, none of which Ctrl-C can lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, TypeVar

from offload.tiers.slab import Arrival, Slab

AnyArrival = TypeVar("AnyArrival", bound=Arrival)


@dataclass
class Departure:
    """A transfer that is about to be started.

    Attributes:
        slab: whose bytes are moved.
        is_write: to the disk, rather than to the slab's memory.
        nbytes: that are moved from the disk, or to it if `is_write`.
        written: that go on to the disk, of a transfer from elsewhere.
        blocks: of a PARTIAL slab, that it brings.
        started: the transfer, once there is one.
    """

    slab: Slab
    is_write: bool
    nbytes: int
    blocks: Sequence[int] = ()
    written: int = 0
    started: Sequence[Arrival] = ()


class Flights:
    """Starts transfers and knows which slabs have one in flight.

    Attributes:
        read_bytes, written_bytes: of all transfers that were started.
    """

    def __init__(self) -> None:
        """Nothing is in flight."""
        self.read_bytes = 0
        self.written_bytes = 0
        self._slabs: dict[Slab, None] = {}
        self._departure: Departure | None = None

    @property
    def slabs(self) -> list[Slab]:
        """Those with a transfer in flight, the one that was started first at the front."""
        return list(self._slabs)

    def start(
        self, departure: Departure, transfer: Callable[..., AnyArrival], args: tuple[Any, ...]
    ) -> AnyArrival:
        """Start a transfer by calling the C function `transfer`, note it, and return it.

        Signal handlers run between C functions: Ctrl-C comes before it is started, or after it is
        in the list, from where the next call of note() takes it.
        """
        started: list[AnyArrival] = []
        departure.started = started
        self._departure = departure
        started.extend(starmap(transfer, (args,)))
        self.note()
        return started[0]

    def note(self) -> None:
        """Take note of a transfer whose start was interrupted; before anything that asks for it."""
        departure = self._departure
        if departure is None:
            return
        slab = departure.slab
        for transfer in departure.started:
            slab.pending = transfer
            slab.pending_write = departure.is_write
            if slab.blocks is not None:
                slab.blocks.arriving = departure.blocks
            self._slabs[slab] = None
        self._departure = None
        if departure.started and departure.is_write:
            self.written_bytes += departure.nbytes
        elif departure.started:
            self.read_bytes += departure.nbytes
            self.written_bytes += departure.written

    def end(self, slab: Slab) -> None:
        """The transfer of `slab` has ended, whatever came of it."""
        slab.pending = None
        self._slabs.pop(slab, None)
