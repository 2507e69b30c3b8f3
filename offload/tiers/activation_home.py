"""ActivationHome: tensors saved for the backward, in an arena of their own and on disk.

Protocol of a saved range (bytes of one storage; its copy is one slab):
 1. save() finds a valid copy of the range, or takes memory of the arena and copies it there. Memory
    that is needed for that is taken from the slabs saved longest ago, which are on disk by then.
 2. a slab starts on its way to disk at once, unless the arena will still hold it when the backward
    begins: so many bytes were alive in the last pass, and the last ones of them fit. Before
    anything is known, `eager` decides.
 3. load() returns a view of the slab's memory, reading it back if need be, and starts reads of
    what was saved before it, as far as there is room: the backward goes in the reverse order.
 4. when the last handle to a range dies (its graph was freed, with or without a backward), its
    memory and its place on disk are free for others.
Slabs are moved by a Mover, so its protocol of memory holds: the arena is a hard limit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from offload import _native
from offload.errors import BudgetError, OffloadError
from offload.tiers.activation_carrier import ActivationCarrier
from offload.tiers.activation_handle import Claim, Handle, SavedRange, witness
from offload.tiers.activation_places import ActivationPlaces
from offload.tiers.activation_range import byte_range
from offload.tiers.compute_device import ComputeDevice
from offload.tiers.mover import Mover
from offload.tiers.saved_ranges import SavedRanges
from offload.tiers.slab import Slab
from offload.tiers.swap_space import SwapSpace

_LOOKAHEAD = 64
"""Saved ranges that are considered for reading ahead."""

_SLACK = 4
"""One part in so many of the arena is not counted on at the end of a forward: what is being read
and used while the backward begins, and what cannot be used between slabs of different sizes."""

_ALIGNMENT = 64
"""A copy lies as its original does, modulo so many bytes: kernels may round by alignment."""


class ActivationHome:
    """Holds activations within an arena, and on disk if there is one.

    Attributes:
        carrier: brings them from and to devices; None: they are in host memory anyway.
        mover: moves their slabs; it has the bytes read and written, and the seconds waited for.
        saved_bytes: that were copied here so far; what was shared is counted once.
        left_bytes: that fitted nowhere and were left alone so far.
        live_bytes: that handles refer to at the moment.
        space: the swap space they may live in; None: there is none.
        closed: nothing can be saved or loaded any more.
    """

    def __init__(
        self,
        arena: _native.HostArena,
        space: SwapSpace | None,
        lock: threading.RLock,
        *,
        eager: bool,
        leaves: bool = False,
        owns_space: bool,
        devices: Sequence[ComputeDevice] = (),
    ) -> None:
        """Hold activations in `arena` and in `space`.

        Args:
            arena: used by nobody else.
            space: None: nothing can live on disk.
            lock: held around every operation.
            eager: write what is saved before it is known whether the arena can hold it.
            leaves: leave alone what fits nowhere or takes more than half of the arena, instead of
                refusing it.
            owns_space: close() closes it.
            devices: for which the arena is pinned, whose activations come and go by copies.
        """
        store = space.store if space is not None else None
        self.mover = Mover(arena, arena, store)
        self.carrier = ActivationCarrier(devices, self.mover) if devices else None
        self.arena_bytes = arena.usage()["budget"]
        self.saved_bytes = 0
        self.left_bytes = 0
        self.live_bytes = 0
        self.closed = False
        self._lock = lock
        self._eager = eager
        self._leaves = leaves
        self.space = space
        self._owns_space = owns_space
        self._places = ActivationPlaces(space) if space is not None else None
        if self._places is not None:
            self.mover.find_place = self._find_place
        self._ranges = SavedRanges()
        self.mover.use_of = self._ranges.use_of
        self._discarded: list[SavedRange] = []
        self._operations = 0  # under way; finalizers then leave everything alone
        self._peaks = (0, 0)  # bytes alive when the last two backwards began
        self._saving = False

    # -- what the hooks call --------------------------------------------------------------------

    def save(self, tensor: torch.Tensor) -> Handle | None:
        """Return what stands for `tensor`, a dense one on CPU or device; None: it is left alone.

        Raises:
            BudgetError: it does not fit, since there is no disk or it is larger than the arena;
                not with `leaves`.
            SwapSpaceError, SwapIOError: the disk is full, or an earlier write failed.
        """
        extent = byte_range(tensor)
        if extent is None:
            return None
        begin, end = extent
        storage = tensor.untyped_storage()
        with self._operation():
            claim = self._ranges.find(storage, begin, end)
            if claim is None:
                try:
                    claim = self._copy(tensor, storage, begin, end)
                except BudgetError:
                    if not self._leaves:
                        raise
                    self.left_bytes += end - begin
                    return None
            saved = claim.saved
            offset = int(tensor.storage_offset()) * tensor.itemsize - saved.begin + saved.shift
        return Handle(
            claim,
            offset,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            witness(tensor),
            tensor._version,
        )

    def load(self, handle: Handle) -> torch.Tensor:
        """Return the saved tensor; its memory is the arena's until the tensor is gone.

        Raises:
            RuntimeError: the original was changed in place since.
            BudgetError: what the backward uses at this moment leaves no room for it.
            SwapIOError, CorruptionError: it was not written, or cannot be read back.
        """
        handle.check_version()
        with self._operation():
            saved = handle.claim.saved
            self._ranges.loading(saved)
            if self._saving:
                self._saving = False
                self._peaks = (self._peaks[1], self.live_bytes)
            with self._budget_hint():
                tensor = self._loaded(handle, saved)
            self._read_ahead(saved)
        return tensor

    def _loaded(self, handle: Handle, saved: SavedRange) -> torch.Tensor:
        if self.carrier is not None and saved.device is not None:
            return handle.view_of(self.carrier.load(saved.device, saved.slab))
        self.mover.fetch(saved.slab)
        if saved.slab.lease is None:
            raise OffloadError(f"{saved.slab.name} is not in memory (internal error)")
        return handle.view(saved.slab.lease)

    def discard(self, saved: SavedRange) -> None:
        """Free a range nobody needs any more; now, or if that cannot be, in the next operation.

        Finalizers call this, at any moment and in any thread: it neither waits nor raises.
        """
        saved.slab.live = _nobody
        pending = saved.slab.pending
        if pending is not None:
            pending.cancel()
        self._discarded.append(saved)
        if self._operations == 0 and self._lock.acquire(blocking=False):
            try:
                if self._operations == 0:
                    self._operations += 1
                    try:
                        self._free_discarded(idle_only=True)
                    finally:
                        self._operations -= 1
            finally:
                self._lock.release()

    def tidy(self) -> None:
        """Free all that was discarded; copies from a device are waited for."""
        if not self.closed:
            with self._operation():
                while self.carrier is not None and self._discarded:
                    self._free(self._discarded.pop())

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self.closed:
            return
        with self._lock:
            self.closed = True
            if self._owns_space and self.space is not None:
                self.space.store.close()

    @property
    def store(self) -> _native.SwapStore | None:
        """Where they are when they are not in memory."""
        return self.mover.store

    # -- saving ---------------------------------------------------------------------------------

    def _copy(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, begin: int, end: int
    ) -> Claim:
        saved = SavedRange()
        saved.device = None if self.carrier is None else self.carrier.device_of(tensor)
        saved.shift = (storage.data_ptr() + begin) % _ALIGNMENT
        if saved.device is not None and saved.shift > begin:
            saved.shift = 0  # a copy takes in what lies before it, and there is nothing
        nbytes = end - begin + saved.shift
        name = f"an activation ({tensor.dtype} {list(tensor.shape)})"
        # Of a larger part it is not sure that it can come back while others are in use.
        most = self.arena_bytes // 2 if self._leaves else self.arena_bytes
        if nbytes > most:
            raise BudgetError(
                f"no room for {name}: {nbytes} bytes are needed, of {self.arena_bytes} for "
                "activations; raise Policy(activation_bytes=...)"
            )
        saved.slab = Slab(name, "activations", nbytes, False, None)
        writes = self._must_write()
        with self._budget_hint():
            if self.carrier is None or saved.device is None:
                self._copy_on_host(saved, storage, begin, end)
            else:
                self._copy_from(saved.device, saved, storage, begin, writes)
        saved.begin, saved.end, saved.address = begin, end, storage.data_ptr()
        saved.storage = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        saved.witness, saved.version = witness(tensor), tensor._version
        claim = Claim(self.discard, saved)
        saved.claim = weakref.ref(claim)
        self._ranges.add(saved)
        self._saving = True
        self.live_bytes += nbytes
        self.saved_bytes += nbytes
        if writes and saved.device is None:
            self.mover.write_back(saved.slab)
        return claim

    def _copy_on_host(
        self, saved: SavedRange, storage: torch.UntypedStorage, begin: int, end: int
    ) -> None:
        slab = saved.slab
        self.mover.hold_new(slab)
        whole = slab.view(0, (slab.nbytes,), (1,), torch.uint8)
        source = torch.empty(0, dtype=torch.uint8).set_(storage, begin, (end - begin,), (1,))
        whole[saved.shift :].copy_(source)

    def _copy_from(
        self,
        device: ComputeDevice,
        saved: SavedRange,
        storage: torch.UntypedStorage,
        begin: int,
        writes: bool,
    ) -> None:
        """Start copying what lies before `begin` too, by which the copy is aligned as it is."""
        if self.carrier is None:
            raise OffloadError(f"{saved.slab.name} cannot be carried (internal error)")
        slab = saved.slab
        if writes:
            slab.swap_object = self._find_place(slab)
        try:
            self.carrier.save(device, slab, storage, begin - saved.shift, writes)
        except BaseException:
            if slab.swap_object is not None and self._places is not None and not slab.pending:
                self._places.give_back(slab.swap_object, slab.nbytes)
            raise

    def _must_write(self) -> bool:
        """Whether the range being saved will have to leave memory before it is needed."""
        if self.mover.store is None:
            return False
        peak = max(self._peaks)
        if peak == 0:
            return self._eager
        return peak - self.live_bytes > self.arena_bytes - self.arena_bytes // _SLACK

    def _find_place(self, slab: Slab) -> int:
        if self._places is None:
            raise OffloadError(f"{slab.name} has no place on disk (internal error)")
        return self._places.take(slab.nbytes)

    # -- loading --------------------------------------------------------------------------------

    def _read_ahead(self, saved: SavedRange) -> None:
        for older, use in self._ranges.before(saved, _LOOKAHEAD):
            if older.slab.wanted and not self._bring(older, use):
                return

    def _bring(self, saved: SavedRange, use: int) -> bool:
        carrier, device = self.carrier, saved.device
        if carrier is not None and device is not None and carrier.may_bring(saved.slab):
            return carrier.bring(device, saved.slab, use)
        return self.mover.prefetch(saved.slab, use)

    # -- freeing --------------------------------------------------------------------------------

    def _free_discarded(self, idle_only: bool) -> None:
        """Free what was discarded; with `idle_only`, what has no transfer in flight."""
        busy = []
        try:
            while self._discarded:
                saved = self._discarded.pop()
                if self._is_busy(saved.slab, idle_only):
                    busy.append(saved)
                else:
                    self._free(saved)
        finally:
            self._discarded += busy

    def _is_busy(self, slab: Slab, idle_only: bool) -> bool:
        """Whether `slab` has a transfer in flight: with `idle_only`, even one that has ended."""
        if slab.pending is not None and (idle_only or not slab.pending.done()):
            return True
        return self.carrier is not None and self.carrier.is_reading(slab)

    def _free(self, saved: SavedRange) -> None:
        self._ranges.remove(saved)
        slab = saved.slab
        if self.carrier is not None:
            self.carrier.forget(slab)
        self.live_bytes -= slab.nbytes
        try:
            self.mover.settle(slab)
        finally:
            self.mover.forget(slab)
            if slab.swap_object is not None and self._places is not None:
                self._places.give_back(slab.swap_object, slab.nbytes)

    @contextmanager
    def _operation(self) -> Iterator[None]:
        with self._lock:
            if self.closed:
                raise OffloadError(
                    "the model was unwrapped between this forward and its backward, and its saved "
                    "activations went with that; run the backward before offload.unwrap()"
                )
            self._operations += 1
            try:
                self._free_discarded(idle_only=False)
                yield
            finally:
                self._operations -= 1

    @contextmanager
    def _budget_hint(self) -> Iterator[None]:
        try:
            yield
        except BudgetError as error:
            what = "Policy(activation_bytes=...)"
            if self.mover.store is None:
                what += ", or give Policy(swap_dir=...)"
            raise BudgetError(f"{error}; for activations that is {what}") from error


def _nobody() -> bool:
    return False
