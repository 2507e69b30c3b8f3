"""Mover: alone copies bytes between tiers.

Protocol of memory:
 1. memory for a slab comes from the arena, which is a hard budget. When it is full, slabs nobody
    holds are given up, the one needed farthest in the future first (Belady), clean ones only.
 2. a prefetch never waits and never evicts what is needed sooner than what it brings.
 3. a demand waits: first for transfers in flight, then for dirty slabs that it sends to disk,
    then for optimizer updates that hold slabs. Only when none of these is left does it raise.
 4. a slab is evicted by dropping the references to its memory. Memory that some tensor still
    refers to returns to the arena when that tensor goes: it is never handed out twice.
Protocol of a slab of which only some bytes are needed:
 1. its memory is all of it, but only the blocks that have those bytes are read: it is PARTIAL, and
    knows which blocks it has (SlabBlocks). Memory that nothing was read to stays as it was.
 2. the next need reads what is still missing of it, beside what is in use. With the last block, the
    slab is as any other. Until then it is clean, and nobody may change it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

from offload import _native
from offload.errors import OffloadError, TransferCancelledError
from offload.tiers.blocks import Span
from offload.tiers.checksums import Checksums
from offload.tiers.eviction import NEVER, Readers, choose_victim, no_room
from offload.tiers.flights import Departure, Flights
from offload.tiers.reads import begin_partial, blocks_read, whole_read
from offload.tiers.slab import Arrival, Residency, Slab


class Mover:
    """Moves slabs between host memory and the swap store. Not thread-safe: the owner serialises."""

    def __init__(
        self,
        home: _native.HostArena,
        ring: _native.HostArena | None,
        store: _native.SwapStore | None,
        debug: bool = False,
    ) -> None:
        """Move slabs between host memory and `store`.

        Pinned slabs take memory of `home`, the others of `ring`: long-lived and short-lived memory
        apart, the ring cannot fragment. Without a store nothing can be spilled. `debug`: see
        checksums.py.
        """
        self._checksums = Checksums(debug)
        self.home = home
        self.ring = ring
        self.store = store
        self.next_use: dict[Slab, int] = {}
        """Position of each slab's next use among the predicted uses; absent: beyond them."""
        self.use_of: Callable[[Slab], int] = lambda slab: self.next_use.get(slab, NEVER)
        """That position; an owner who can tell it without a record of each slab replaces this."""
        self.relieve: Callable[[], bool] = lambda: False
        """Waits for one background user of slabs to end; False when there is none."""
        self.find_place: Callable[[Slab], int] | None = None
        """Gives a slab its swap object when it is first written, if it was made without one."""
        self.readers: Readers | None = None
        """Who else copies from the slabs' memory."""
        self.stall_seconds: dict[str, float] = {}
        self.misses = 0
        self._process = os.getpid()
        self._spillable: dict[Slab, None] = {}  # unpinned slabs with memory, oldest first
        self._flights = Flights()

    @property
    def read_bytes(self) -> int:
        """Of all reads that were started."""
        return self._flights.read_bytes

    @property
    def written_bytes(self) -> int:
        """Of all writes that were started."""
        return self._flights.written_bytes

    # -- what users of a slab call ------------------------------------------------------------

    def hold_new(self, slab: Slab) -> None:
        """Give `slab` memory to be filled by the caller; whatever it held is forgotten."""
        self.settle(slab)
        self._hold_new(slab)

    def _hold_new(self, slab: Slab) -> None:
        if slab.lease is None:
            self._take_memory(slab)
        slab.residency = Residency.HOST
        slab.dirty = True
        slab.source = slab.blocks = None
        self._checksums.forget(slab)

    def load_from(self, slab: Slab, source: _native.FileRanges) -> None:
        """Replace the bytes of `slab` by those of files, which it is read from afterwards.

        It is clean or holds nothing, and nobody holds it. After a failure it is as it was, but for
        its memory.
        """
        self._finish(slab)
        before = slab.source, slab.residency
        self._drop(slab)  # somebody may have kept a tensor of what it holds
        self._take_memory(slab)
        slab.source, slab.residency = source, Residency.DISK
        try:
            self._start_read(slab, demand=True)
            self._finish(slab)
        except OffloadError:
            slab.source = before[0]
            slab.residency = Residency.ABSENT if before[1] is Residency.ABSENT else Residency.DISK
            raise

    def receive(
        self,
        slab: Slab,
        start: Callable[[_native.Lease], Callable[[], _native.DeviceTransfer]],
        on_disk: bool,
        checksum: int | None = None,
    ) -> _native.DeviceTransfer:
        """Have a transfer from a device fill `slab`; whatever it held is forgotten.

        Args:
            slab: takes memory now.
            start: given that memory, returns what starts the transfer: a C function with its
                arguments (see _start). It comes after the readers' copies from that memory.
            on_disk: it writes the slab's object too.
            checksum: CRC32C of what will arrive, if known.
        """
        self._finish(slab)
        self._hold_new(slab)
        if slab.lease is None:
            raise OffloadError(f"{slab.name} is not in memory (internal error)")
        slab.changed_in_flight = not on_disk
        self._checksums.expect(slab, checksum)
        departure = Departure(slab, False, 0, written=slab.nbytes if on_disk else 0)
        return self._flights.start(departure, start(slab.lease), ())

    def read_on(
        self,
        slab: Slab,
        start: Callable[[_native.Lease], Callable[[], _native.DeviceTransfer]],
        use: int,
    ) -> _native.DeviceTransfer | None:
        """Have `slab`, which is on disk, read by a transfer that goes on with its bytes.

        Args:
            slab: takes memory now.
            start: as for receive().
            use: the number of its next use from now.

        Returns None when there is no room that may be taken.
        """
        self._flights.note()
        if not self.take_ahead(slab, use) or slab.lease is None:
            return None
        try:
            return self._flights.start(Departure(slab, False, slab.nbytes), start(slab.lease), ())
        except OffloadError:
            self._drop(slab)  # nothing was read
            raise

    def fetch(self, slab: Slab, ranges: Iterable[Span] | None = None) -> None:
        """Have the current bytes of `slab` in memory; waits for the disk when they are not.

        With `ranges`, those bytes at least.
        """
        self._flights.note()
        if slab.residency is Residency.HOST and slab.pending is None:
            return
        if slab.pending is not None and not slab.pending_write:
            self._finish(slab)
            if slab.residency is not Residency.PARTIAL:
                return
        if slab.residency is Residency.HOST:
            return  # being written: the bytes in memory stay valid
        if slab.residency is Residency.ABSENT:
            raise OffloadError(f"{slab.name} was needed before it was ever stored (internal error)")
        if slab.lease is None:
            self._take_memory(slab)
        if self._start_missing(slab, ranges, demand=True):
            self.misses += 1
            self._finish(slab)

    def prefetch(self, slab: Slab, use: int, ranges: Iterable[Span] | None = None) -> bool:
        """Start bringing `slab` to memory for use number `use` from now, if that is free of harm.

        With `ranges`, only blocks with those bytes, unless some of it is in memory already. Returns
        False when there is no room that may be taken.
        """
        self._flights.note()
        if slab.lease is not None or slab.residency is not Residency.DISK:
            return True
        if not self.take_ahead(slab, use):
            return False
        self._start_missing(slab, ranges, demand=False)
        return True

    def take(self, slab: Slab) -> None:
        """Give `slab`, which is on disk, memory that an update will read it into."""
        if slab.lease is None:
            self._take_memory(slab)

    def take_ahead(self, slab: Slab, use: int) -> bool:
        """Do the same for use number `use` from now, if that is free of harm; else return False."""
        if slab.lease is None:
            slab.lease = self._lease(slab.nbytes, farther_than=use)
            if slab.lease is None:
                return False
            self._spillable[slab] = None
        return True

    def mark_loaded(self, slab: Slab) -> None:
        """Somebody else read it into its memory: memory and disk hold the current bytes."""
        slab.residency = Residency.HOST
        slab.dirty = False
        slab.blocks = None
        self._checksums.note(slab)

    def write_back(self, slab: Slab) -> None:
        """Start writing a dirty slab; it stays in memory and is clean once that is done."""
        self._flights.note()
        if slab.pinned or not slab.dirty or slab.pending is not None:
            return
        if slab.swap_object is None and self.find_place is not None:
            slab.swap_object = self.find_place(slab)
        if self.store is None or slab.swap_object is None or slab.lease is None:
            raise OffloadError(f"{slab.name} has no place on disk (internal error)")
        args = slab.swap_object, slab.lease, slab.nbytes
        self._flights.start(Departure(slab, True, slab.nbytes), self.store.write, args)

    def settle(self, slab: Slab) -> None:
        """Wait until no transfer of `slab` is in flight: its bytes may be changed."""
        self._finish(slab)
        if self.readers is not None:
            self.readers.settle(slab)

    def in_flight(self, slab: Slab) -> list[Arrival]:
        """Return what has to end before a native job may use and change `slab`.

        Nobody waits but for bytes on their way from disk, and for those that are to be compared
        with a checksum before anybody uses them. settle() after the job takes note of the others.
        """
        self._flights.note()
        if slab.residency is not Residency.HOST or self._checksums.expects(slab):
            self._finish(slab)
        first = [] if slab.pending is None else [slab.pending]
        return first if self.readers is None else [*first, *self.readers.in_flight(slab)]

    def mark_dirty(self, slab: Slab) -> None:
        """The bytes in memory were changed; a copy on disk, or on its way there, is not current.

        A slab that came from a file lives in the swap store from now on.
        """
        if slab.residency is Residency.PARTIAL:
            raise OffloadError(f"{slab.name} was changed while parts were on disk (internal error)")
        slab.source = None
        slab.dirty = True
        slab.changed_in_flight = slab.pending_write
        self._checksums.forget(slab)

    def mark_on_disk(self, slab: Slab) -> None:
        """The bytes on disk were replaced by somebody else; memory holds nothing."""
        slab.residency = Residency.DISK
        slab.dirty = False

    def forget(self, slab: Slab) -> None:
        """Give up the content, and the memory unless it is pinned."""
        self._finish(slab)
        slab.residency = Residency.ABSENT
        slab.dirty = False
        slab.source = None
        if not slab.pinned:
            self._drop(slab)

    def check_process(self) -> None:
        """Raise OffloadError in a forked child: the threads that end transfers are not in it."""
        if os.getpid() != self._process:
            raise OffloadError(
                "this is a forked child, and a wrapped model belongs to the process that wrapped "
                "it; use it there, or start the child with spawn and wrap a model in it"
            )

    def poll(self) -> None:
        """Take note of transfers that are done. Raises the error of one that failed."""
        self.check_process()
        self._flights.note()
        for slab in self._flights.slabs:
            if slab.pending is not None and slab.pending.done():
                self._finish(slab)

    def wait(self, transfer: Arrival, why: str) -> None:
        """Wait for `transfer`; the time counts as a stall for `why`."""
        self.check_process()
        if transfer.done():
            transfer.wait()
            return
        begun = time.perf_counter()
        try:
            transfer.wait()
        finally:
            self.note_stall(why, time.perf_counter() - begun)

    def note_stall(self, why: str, seconds: float) -> None:
        """Count time that a training thread waited."""
        self.stall_seconds[why] = self.stall_seconds.get(why, 0.0) + seconds

    # -- memory ---------------------------------------------------------------------------------

    def _take_memory(self, slab: Slab) -> None:
        if slab.pinned:
            slab.lease = self.home.allocate(slab.nbytes)
            return
        lease = self._lease(slab.nbytes, farther_than=None)
        if lease is None:
            raise no_room(slab, self._spillable, self.ring)
        slab.lease = lease
        self._spillable[slab] = None

    def _lease(self, nbytes: int, farther_than: int | None) -> _native.Lease | None:
        """Return memory, evicting for it; with `farther_than` set, without waiting or harm."""
        if self.ring is None:
            return None
        self.poll()
        while True:
            lease = self.ring.try_allocate(nbytes)
            if lease is not None:
                return lease
            victim = choose_victim(self._spillable, self.use_of, self.readers, farther_than)
            if victim is not None:
                self.evict(victim)
            elif farther_than is not None or not self._make_room():
                return None

    def _make_room(self) -> bool:
        """Wait for, or cause, a slab that can be given up; False when there is no way."""
        if self._await_transfer() or (self.readers is not None and self.readers.end_one()):
            return True
        return self._send_dirty() or self.relieve()

    def evict(self, slab: Slab) -> None:
        """Give up the memory of a slab that nobody holds and that is clean or unwanted."""
        if slab.wanted:
            self._checksums.verify(slab)
            slab.residency = Residency.DISK
        else:
            slab.residency = Residency.ABSENT
            slab.dirty = False
        self._drop(slab)

    def _drop(self, slab: Slab) -> None:
        self._checksums.forget(slab)
        if self.readers is not None:
            self.readers.leave(slab)
        slab.lease = slab.blocks = None
        self._spillable.pop(slab, None)

    def _await_transfer(self) -> bool:
        """Wait for the oldest write in flight, or else read; False when there is none."""
        slabs = self._flights.slabs
        slab = next((s for s in slabs if s.pending_write), next(iter(slabs), None))
        if slab is None:
            return False
        self._finish(slab, why="room")
        return True

    def _send_dirty(self) -> bool:
        """Start writing the dirty slab needed last; False when there is none, or no disk."""
        if self.store is None:
            return False
        dirty = [s for s in self._spillable if s.dirty and not s.locks and s.pending is None]
        if not dirty:
            return False
        self.write_back(max(dirty, key=self.use_of))
        return True

    # -- transfers ------------------------------------------------------------------------------

    def _start_missing(self, slab: Slab, ranges: Iterable[Span] | None, demand: bool) -> bool:
        """Start to read what `ranges` need and memory lacks; False when that is nothing."""
        if ranges is None and slab.residency is Residency.DISK:
            self._start_read(slab, demand)
            return True
        missing = begin_partial(slab, self.store).missing(ranges)
        if missing:
            self._start_read(slab, demand, missing)
        return bool(missing)

    def _start_read(self, slab: Slab, demand: bool, blocks: Sequence[int] = ()) -> None:
        """Start to read `slab`; of a PARTIAL one, `blocks`."""
        if slab.lease is None:
            raise OffloadError(f"{slab.name} has no memory to be read to (internal error)")
        try:
            if slab.residency is Residency.PARTIAL:
                read = blocks_read(slab, self.store, blocks, demand)
            else:
                read = whole_read(slab, self.store, demand)
            started = Departure(slab, False, read.nbytes, read.blocks)
            self._flights.start(started, read.start, read.args)
        except OffloadError:
            self._drop_unread(slab)
            raise

    def _drop_unread(self, slab: Slab) -> None:
        """A read of `slab` failed: the disk keeps its version, and memory the blocks it had."""
        if slab.residency is not Residency.PARTIAL:
            self._drop(slab)

    def _finish(self, slab: Slab, why: str | None = None) -> None:
        """Wait for the slab's transfer, if any, and take note of its outcome."""
        self._flights.note()
        transfer = slab.pending
        if transfer is None:
            return
        was_write = slab.pending_write
        interrupted = True
        try:
            self.wait(transfer, why or slab.kind)
            interrupted = False
        except OffloadError as error:
            interrupted = False
            if not was_write:
                self._drop_unread(slab)
            if slab.wanted or not isinstance(error, TransferCancelledError):
                raise
            slab.residency = Residency.ABSENT  # cancelled when nobody wanted it any more
        finally:
            if not interrupted:  # Ctrl-C leaves the transfer in flight, and noted as such
                self._flights.end(slab)
        if was_write:
            slab.dirty = slab.changed_in_flight
            slab.pending_write = slab.changed_in_flight = False
        elif slab.blocks is not None:
            slab.blocks.note_arrival()
            if slab.blocks.is_complete:
                self.mark_loaded(slab)
        elif slab.lease is not None:
            slab.residency = Residency.HOST
            slab.dirty, slab.changed_in_flight = slab.changed_in_flight, False
            self._checksums.note_arrival(slab)
        if not slab.dirty and slab.blocks is None:
            self._checksums.note(slab)
