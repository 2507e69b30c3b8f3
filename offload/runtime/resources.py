"""What a plan is carried out with: the swap store, the arenas and the update pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence

from offload import _native
from offload.errors import OffloadError, SwapSpaceError
from offload.planner import DiskSpec, UnitSpec, place, smallest_budget
from offload.policy import Policy
from offload.tiers.context import RuntimeContext
from offload.tiers.disk_profile import DiskProfile, disk_profile
from offload.tiers.mover import Mover

_PHASE_BYTES = 32 << 20
"""Read or written at a time on a disk that does not take a mix well: long enough that a change of
direction costs little, short enough that a fetch does not wait long for its turn."""


class Resources:
    """Chosen before anything is allocated; ``open`` allocates, all or nothing."""

    def __init__(self, policy: Policy, specs: Sequence[UnitSpec]) -> None:
        """Measure the disks where something must be spilled and make the plan.

        Raises:
            BudgetError: the smallest host budget that would do is larger than the policy's.
            SwapIOError: a swap directory cannot be used.
        """
        self.policy = policy
        self.profiles: tuple[DiskProfile, ...] = ()
        must_spill = policy.budget.host_bytes < smallest_budget(specs, None)
        if policy.swap_dirs and policy.calibrate_disk and must_spill:
            self.profiles = tuple(disk_profile(folder) for folder in policy.swap_dirs)
        self.plan = place(specs, policy.budget.host_bytes, self._disk_spec())

    def _disk_spec(self) -> DiskSpec | None:
        policy = self.policy
        if not policy.swap_dirs:
            return None
        store_bytes = 0
        if policy.encrypt_swap:
            store_bytes = _native.SwapStore.bounce_bytes_for(
                len(policy.swap_dirs), policy.queue_depth, policy.block_bytes
            )
        if not self._measured:
            return DiskSpec(policy.block_bytes, store_bytes)
        reads = sum(p.read_bps for p in self.profiles)
        writes = sum(p.write_bps for p in self.profiles)
        return DiskSpec(policy.block_bytes, store_bytes, reads / writes)

    @property
    def _measured(self) -> bool:
        return bool(self.profiles) and all(p.measured for p in self.profiles)

    def open(self) -> RuntimeContext:
        """Return the context in which the plan is carried out.

        Raises:
            SwapSpaceError, SwapIOError: the swap directories cannot take what must be spilled.
            BudgetError: the system refuses the memory.
        """
        store = self._open_store() if self.plan.spills else None
        try:
            return self._fill_context(store)
        except BaseException:
            if store is not None:
                store.close()  # the exception may be kept, and the file with it
            raise

    def _open_store(self) -> _native.SwapStore:
        policy = self.policy
        if not policy.swap_dirs:
            raise OffloadError("the plan spills without a swap directory (internal error)")
        return _native.SwapStore(
            list(policy.swap_dirs),
            policy.io_engine,
            policy.queue_depth,
            block_bytes=policy.block_bytes,
            rates=[p.turns_bps for p in self.profiles] if self._measured else [],
            phase_bytes=[_PHASE_BYTES if p.phases else 0 for p in self.profiles],
            encrypt=policy.encrypt_swap,
        )

    def _fill_context(self, store: _native.SwapStore | None) -> RuntimeContext:
        policy, plan = self.policy, self.plan
        if store is not None:
            self._reserve(store)
        home = _native.HostArena(plan.pinned_bytes, policy.debug)
        ring = _native.HostArena(plan.ring_bytes, policy.debug) if plan.ring_bytes else None
        if store is not None:
            for arena in (home, ring):
                if arena is not None:
                    store.add_memory(arena)
        threads = 1 if plan.spills else len(os.sched_getaffinity(0))
        pipeline = _native.UpdatePipeline(store, home, plan.staging_sets, threads)
        return RuntimeContext(policy, plan, Mover(home, ring, store), pipeline)

    def _reserve(self, store: _native.SwapStore) -> None:
        plan, block = self.plan, store.block_bytes
        objects = sum(
            (not p.pin_params) + (not p.pin_grads) + 2 * (not p.pin_state) for p in plan.placements
        )
        wanted = sum(plan.disk_bytes().values()) + objects * block
        spare = min(plan.budget_bytes, wanted) + objects * block
        limit = self.policy.budget.disk_bytes
        if limit is not None and wanted + spare > limit:
            raise SwapSpaceError(
                28,
                f"Budget(disk={limit}) is too small: {wanted} bytes live on disk and {spare} more "
                f"are needed while they are replaced, {wanted + spare} in all",
            )
        store.reserve(wanted, spare)

    def notes(self, store: _native.SwapStore | None) -> tuple[str, ...]:
        """Return which choices were made, and why."""
        if store is None:
            return ()
        notes = [f"I/O engine: {store.engine} ({store.engine_reason})"]
        if store.encrypted:
            notes.append("swap is encrypted (AES-256-XTS, key in memory only)")
        notes += [p.note for p in self.profiles if p.note]
        return (*notes, store.note) if store.note else tuple(notes)
