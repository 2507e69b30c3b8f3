"""What a plan is carried out with: the swap store, the arenas and the update pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from offload import _native
from offload.planner import DiskSpec, UnitSpec, place, smallest_budget
from offload.policy import Policy
from offload.tiers.context import RuntimeContext
from offload.tiers.disk_profile import DiskProfile
from offload.tiers.mover import Mover
from offload.tiers.swap_space import SwapSpace, profile_disks, store_memory
from offload.tiers.update_staging import open_pipeline


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
        if must_spill:
            self.profiles = profile_disks(policy)
        self.plan = place(specs, policy.budget.host_bytes, self._disk_spec())

    def _disk_spec(self) -> DiskSpec | None:
        policy = self.policy
        if not policy.swap_dirs:
            return None
        store_bytes = store_memory(policy)
        if not self.profiles or not all(p.measured for p in self.profiles):
            return DiskSpec(policy.block_bytes, store_bytes)
        reads = sum(p.read_bps for p in self.profiles)
        writes = sum(p.write_bps for p in self.profiles)
        return DiskSpec(policy.block_bytes, store_bytes, reads / writes)

    def open(self) -> RuntimeContext:
        """Return the context in which the plan is carried out.

        Raises:
            SwapSpaceError, SwapIOError: the swap directories cannot take what must be spilled.
            BudgetError: the system refuses the memory.
        """
        space = SwapSpace(self.policy, self.profiles) if self.plan.spills else None
        try:
            return self._fill_context(space)
        except BaseException:
            if space is not None:
                space.store.close()  # the exception may be kept, and the file with it
            raise

    def _fill_context(self, space: SwapSpace | None) -> RuntimeContext:
        policy, plan = self.policy, self.plan
        store = space.store if space is not None else None
        if space is not None:
            objects = sum(
                (not p.pin_params) + (not p.pin_grads) + p.unit.state_slabs * (not p.pin_state)
                for p in plan.placements
            )
            space.reserve(sum(plan.disk_bytes().values()), objects)
        # What the plan leaves free is for an optimizer that keeps more state than AdamW.
        home = _native.HostArena(plan.pinned_bytes + plan.free_bytes, policy.debug)
        ring = _native.HostArena(plan.ring_bytes, policy.debug) if plan.ring_bytes else None
        if store is not None:
            for arena in (home, ring):
                if arena is not None:
                    store.add_memory(arena)
        pipeline = open_pipeline(store, home, plan.staging_bytes)
        return RuntimeContext(policy, plan, Mover(home, ring, store), pipeline, space)
