"""StateHome: where optimizer state lives when it does not live in plain tensors."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from offload import _native
from offload.errors import BudgetError, OffloadError
from offload.policy import Policy
from offload.tiers.mover import Mover
from offload.tiers.slab import Residency, Slab
from offload.tiers.swap_space import SwapSpace, profile_disks, store_memory
from offload.tiers.update_staging import open_pipeline, staging_bytes

if TYPE_CHECKING:
    from offload.tiers.context import RuntimeContext


class StateHome:
    """Makes slabs of optimizer state: pinned in host memory while the budget lasts, else on disk.

    Attributes:
        mover: moves the slabs.
        lock: to be held around every use of the mover, the pipeline or a slab.
        room: bytes of host memory left for pinned slabs.
        closed: its slabs hold nothing any more.
    """

    def __init__(
        self,
        mover: Mover,
        space: SwapSpace | None,
        pipeline: _native.UpdatePipeline | None,
        room: int,
        policy: Policy,
        lock: threading.RLock | None = None,
        owns: bool = True,
    ) -> None:
        """Take `room` bytes of ``mover.home`` for pinned slabs; see the class methods.

        Args:
            mover: without a ring, slabs on disk never come to memory as a whole.
            space: None: nothing can live on disk.
            pipeline: None: slabs are not updated in place.
            room: bytes of the home arena that nobody else will ask for.
            policy: whose budget it is; for messages.
            lock: that of the mover's owner; None: the mover has no other owner.
            owns: close() closes the pipeline and the swap space.
        """
        self.mover = mover
        self.lock = lock or threading.RLock()
        self.room = room // mmap.PAGESIZE * mmap.PAGESIZE
        self._lost = room - self.room  # less than a page
        self.closed = False
        self._policy = policy
        self._space = space
        self._pipeline = pipeline
        self._owns = owns
        self._discarded: list[Slab] = []

    @classmethod
    def of_policy(cls, policy: Policy, total_bytes: int | None = None) -> StateHome:
        """Return a home of its own for a plain model, for slabs that the pipeline updates in place.

        It holds no more than ``policy.budget.host``, the pipeline's staging and the swap store's
        buffers included. Slabs on disk are read and written by the pipeline, copy_out() and
        copy_in(); the mover has no ring to bring them to.

        Args:
            policy: its budget, swap directories and I/O options are used, the rest concerns models.
            total_bytes: of all slabs that will be made, at most, each rounded up to pages. Where
                these fit, no swap file is made. None: not known.

        Raises:
            BudgetError: the budget has no room for the staging, or the system refuses the memory.
            SwapIOError: a swap directory cannot be used.
        """
        budget = policy.budget.host_bytes
        fits = total_bytes is not None and total_bytes <= budget
        if fits or not policy.swap_dirs:
            home = _native.HostArena(budget, policy.debug)
            pipeline = open_pipeline(None, home, 0)
            return cls(Mover(home, None, None), None, pipeline, budget, policy)
        staging = staging_bytes(budget, policy.block_bytes)
        pinned = _left(policy, staging)
        space = SwapSpace(policy, profile_disks(policy))
        try:
            home = _native.HostArena(pinned + staging, policy.debug)
            space.store.add_memory(home)
            pipeline = open_pipeline(space.store, home, staging)
        except BaseException:
            space.store.close()
            raise
        return cls(Mover(home, None, space.store, policy.debug), space, pipeline, pinned, policy)

    @classmethod
    def passing(cls, policy: Policy) -> StateHome:
        """Return a home of its own for a plain model, for slabs that are used in memory.

        It holds no more than ``policy.budget.host``, the swap store's buffers included. With a
        swap directory no slab is pinned, and the mover's ring is the whole budget. There is no
        pipeline.

        Raises:
            BudgetError, SwapIOError: as of_policy().
        """
        budget = policy.budget.host_bytes
        if not policy.swap_dirs:
            home = _native.HostArena(budget, policy.debug)
            return cls(Mover(home, None, None), None, None, budget, policy)
        left = _left(policy, 0)
        space = SwapSpace(policy, profile_disks(policy))
        try:
            ring = _native.HostArena(left, policy.debug)
            space.store.add_memory(ring)
        except BaseException:
            space.store.close()
            raise
        return cls(Mover(ring, ring, space.store, policy.debug), space, None, 0, policy)

    @classmethod
    def of_context(cls, context: RuntimeContext) -> StateHome:
        """Return the home of optimizer state of a wrapped model; always the same one.

        Its room for pinned slabs is ``Plan.state_room_bytes``.
        """
        with context.lock:
            plan = context.plan
            if context.state_home is None:
                context.state_home = cls(
                    context.mover,
                    context.space,
                    context.pipeline,
                    plan.state_room_bytes,
                    context.policy,
                    context.lock,
                    owns=False,
                )
            return context.state_home

    @property
    def pipeline(self) -> _native.UpdatePipeline:
        """What updates slabs in place."""
        if self._pipeline is None:
            raise OffloadError("this home of optimizer state has no pipeline (internal error)")
        return self._pipeline

    @property
    def store(self) -> _native.SwapStore | None:
        """Where the slabs that are not pinned live."""
        return self.mover.store

    def make_slab(
        self, name: str, nbytes: int, kind: str = "optimizer state", on_disk: bool = False
    ) -> Slab:
        """Return a new slab that holds nothing; its place, in memory or on disk, is reserved.

        Args:
            name: for messages.
            nbytes: more than 0.
            kind: under which waiting for it is counted.
            on_disk: leave the room in memory to others; there is a disk.

        Raises:
            BudgetError: there is no room in memory and no disk to live on.
            SwapSpaceError: there is no room in memory, nor on the disk.
        """
        pages = page_bytes(nbytes)
        with self.lock:
            while self._discarded:
                self.free_slab(self._discarded.pop())
            if pages <= self.room and not on_disk:
                self.room -= pages
                return Slab(name, kind, nbytes, True, None)
            if self._space is None:
                raise self._refused(name, pages, more="at least ")
            return Slab(name, kind, nbytes, False, self._space.create(nbytes))

    def check_room(self, nbytes: Sequence[int], what: str) -> None:
        """Raise BudgetError where slabs of `nbytes` do not fit and there is no disk for them."""
        pages = sum(map(page_bytes, nbytes))
        with self.lock:
            while self._discarded:
                self.free_slab(self._discarded.pop())
            if pages > self.room and self._space is None:
                raise self._refused(what, pages)

    def _refused(self, what: str, pages: int, more: str = "") -> BudgetError:
        policy = self._policy
        least = policy.budget.host_bytes - self._lost + pages - self.room
        disk = "" if policy.swap_dirs else ", or give Policy(swap_dir=...)"
        return BudgetError(
            f"no room for {what}: {pages} bytes are needed, {self.room} are left of the host "
            "budget for optimizer state, and there is no disk to spill to; the smallest host "
            f"budget that would do is {more}{least} bytes, Budget(host={least}){disk}"
        )

    def free_slab(self, slab: Slab) -> None:
        """Give up a slab's content and its place. It must not be in use by an update."""
        with self.lock:
            self.mover.forget(slab)
            if slab.pinned:
                slab.lease = None
                self.room += page_bytes(slab.nbytes)
            elif self._space is not None and slab.swap_object is not None:
                self._space.remove(slab.swap_object)
                slab.swap_object = None

    def discard(self, slab: Slab) -> None:
        """Do what free_slab() does, but when the next slab is made: finalizers may call this."""
        slab.live = _nobody
        self._discarded.append(slab)

    def copy_out(self, slab: Slab) -> torch.Tensor:
        """Return a copy of the slab's current bytes, uint8, in memory outside of the budget.

        Bytes that nobody ever wrote are zero.
        """
        with self.lock:
            self.mover.settle(slab)
            if slab.residency is Residency.HOST:
                return slab.view(0, (slab.nbytes,), (1,), torch.uint8).clone()
            if slab.residency is Residency.ABSENT:
                return torch.zeros(slab.nbytes, dtype=torch.uint8)
            store, swap_object = self._on_disk(slab)
            lease = _outside(slab.nbytes)
            self.mover.wait(store.read(swap_object, lease, slab.nbytes, demand=True), slab.kind)
            return torch.frombuffer(lease, dtype=torch.uint8, count=slab.nbytes)

    def copy_in(self, slab: Slab, content: torch.Tensor) -> None:
        """Replace the slab's bytes by `content`: uint8, one-dimensional, of the slab's size.

        Where the slab lives on disk and is not in memory, it is written there through a copy
        outside of the budget; after a failure the previous bytes stay.
        """
        with self.lock:
            self.mover.settle(slab)
            if slab.pinned or slab.residency is Residency.HOST:
                self.mover.hold_new(slab)
                slab.view(0, (slab.nbytes,), (1,), torch.uint8).copy_(content)
                return
            store, swap_object = self._on_disk(slab)
            lease = _outside(slab.nbytes)
            torch.frombuffer(lease, dtype=torch.uint8, count=slab.nbytes).copy_(content)
            self.mover.wait(store.write(swap_object, lease, slab.nbytes, demand=True), slab.kind)
            self.mover.mark_on_disk(slab)

    def _on_disk(self, slab: Slab) -> tuple[_native.SwapStore, int]:
        if self.store is None or slab.swap_object is None:
            raise OffloadError(f"{slab.name} has no place on disk (internal error)")
        return self.store, slab.swap_object

    def check_open(self) -> None:
        """Raise OffloadError when the slabs hold nothing any more."""
        if self.closed:
            raise OffloadError(
                "this optimizer state went with the wrapped model it belonged to; take "
                "optimizer.state_dict() before offload.unwrap(), and load it afterwards"
            )

    def close(self) -> None:
        """Give everything back; a wrapped model closes its pipeline and files itself."""
        if self.closed:
            return
        self.closed = True
        if not self._owns:
            return
        with self.lock:
            if self._pipeline is not None:
                self._pipeline.close()
            if self._space is not None:
                self._space.store.close()


def page_bytes(nbytes: int) -> int:
    """Return what a slab of `nbytes` takes of an arena: whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _nobody() -> bool:
    return False


def _left(policy: Policy, staging: int) -> int:
    """What of the host budget is left for slabs."""
    store = store_memory(policy)
    left = policy.budget.host_bytes - staging - store
    if left < mmap.PAGESIZE:
        raise BudgetError(
            f"Budget(host={policy.budget.host_bytes}) is too small: {staging} bytes are needed for "
            f"the update's staging, {store} for the swap store and {mmap.PAGESIZE} for state, "
            f"{staging + store + mmap.PAGESIZE} in all"
        )
    return left


def _outside(nbytes: int) -> _native.Lease:
    """Memory of its own that a transfer can use."""
    return _native.HostArena(page_bytes(nbytes)).allocate(nbytes)
