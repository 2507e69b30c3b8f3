"""What a plan is carried out with: the swap store, the arenas and the update pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from offload import _native
from offload.errors import OffloadError
from offload.planner import (
    DevicePlan,
    DiskSpec,
    UnitSpec,
    activation_share,
    place,
    place_on_device,
    smallest_budget,
)
from offload.policy import Policy, parse_bytes
from offload.tiers.activation_home import ActivationHome
from offload.tiers.context import RuntimeContext
from offload.tiers.device_tier import DeviceTier
from offload.tiers.disk_profile import DiskProfile
from offload.tiers.mover import Mover
from offload.tiers.state_home import page_bytes
from offload.tiers.swap_space import SwapSpace, profile_disks, store_memory
from offload.tiers.update_staging import open_pipeline

_DEVICE_SLACK = 1 << 20
"""Of a simulated device's memory beyond the budget: what its arenas are rounded up by."""


class Resources:
    """Chosen before anything is allocated; ``open`` allocates, all or nothing."""

    def __init__(self, policy: Policy, specs: Sequence[UnitSpec]) -> None:
        """Measure the disks where something must be spilled and make the plan.

        Raises:
            BudgetError: the smallest host or device budget that would do is larger than the
                policy's.
            SwapIOError: a swap directory cannot be used.
        """
        self.policy = policy
        self.profiles: tuple[DiskProfile, ...] = ()
        must_spill = policy.budget.host_bytes < smallest_budget(specs, None)
        if must_spill or policy.moves_activations:
            self.profiles = profile_disks(policy)
        disk = self._disk_spec()
        self.plan = place(
            specs, policy.budget.host_bytes, disk, self._activation_bytes(specs, disk)
        )
        self.device_plan: DevicePlan | None = None
        if policy.pace is not None:
            self.device_plan = place_on_device(specs, policy.budget.device_bytes)

    def _activation_bytes(self, specs: Sequence[UnitSpec], disk: DiskSpec | None) -> int:
        policy = self.policy
        if not policy.moves_activations:
            return 0
        if policy.activation_bytes is not None:
            nbytes = parse_bytes(policy.activation_bytes)
        else:
            least = smallest_budget(specs, disk)
            nbytes = activation_share(policy.activations, policy.budget.host_bytes, least)
        return page_bytes(nbytes)

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
        spills_activations = self.policy.moves_activations and bool(self.policy.swap_dirs)
        needs_space = self.plan.spills or spills_activations
        space = SwapSpace(self.policy, self.profiles) if needs_space else None
        try:
            context = self._fill_context(space if self.plan.spills else None)
            if self.policy.moves_activations:
                context.activations = self._activation_home(context, space)
            return context
        except BaseException:
            if space is not None:
                space.store.close()  # the exception may be kept, and the file with it
            raise

    def _fill_context(self, space: SwapSpace | None) -> RuntimeContext:
        policy, plan = self.policy, self.plan
        store = space.store if space is not None else None
        if space is not None:
            space.reserve(plan.swap_bytes, sum(p.swap_objects for p in plan.placements))
        # What the plan leaves free is for an optimizer that keeps more state than AdamW.
        home_bytes, device = plan.pinned_bytes + plan.free_bytes, self._open_device()
        home = _native.HostArena(home_bytes, policy.debug, pin=device)
        ring = None
        if plan.ring_bytes:
            ring = _native.HostArena(plan.ring_bytes, policy.debug, pin=device)
        if store is not None:
            for arena in (home, ring):
                if arena is not None:
                    store.add_memory(arena)
        pipeline = open_pipeline(store, home, plan.staging_bytes)
        mover = Mover(home, ring, store, policy.debug)
        tier = self._device_tier(device, mover) if device is not None else None
        return RuntimeContext(policy, plan, mover, pipeline, space, tier)

    def _open_device(self) -> _native.Device | None:
        if self.policy.pace is None:
            return None
        memory = self.policy.budget.device_bytes + _DEVICE_SLACK
        return _native.simulated_device(memory, pace=self.policy.pace)

    def _device_tier(self, device: _native.Device, mover: Mover) -> DeviceTier:
        plan, poison = self.device_plan, self.policy.debug
        if plan is None:
            raise OffloadError("nothing was planned for the device (internal error)")
        home = None
        if plan.home_bytes:
            home = _native.DeviceArena(device, plan.home_bytes, poison)
        return DeviceTier(device, home, _native.DeviceArena(device, plan.ring_bytes, poison), mover)

    def _activation_home(self, context: RuntimeContext, space: SwapSpace | None) -> ActivationHome:
        arena = _native.HostArena(self.plan.activation_bytes, self.policy.debug)
        if space is not None:
            space.store.add_memory(arena)
        return ActivationHome(
            arena,
            space,
            context.lock,
            eager=self.policy.activations != "host",
            leaves=self.policy.activations == "auto",
            owns_space=not self.plan.spills,
        )
