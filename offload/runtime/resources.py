"""What a plan is carried out with: the swap store, the arenas and the update pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from offload import _native
from offload.errors import PolicyError
from offload.planner import (
    DevicePlan,
    DiskSpec,
    UnitSpec,
    activation_share,
    place,
    place_on_device,
    smallest_budget,
    smallest_device_budget,
    split_updates,
)
from offload.policy import Policy, parse_bytes
from offload.tiers.activation_home import ActivationHome
from offload.tiers.compute_device import (
    ComputeDevice,
    device_title,
    shares_memory,
    torch_devices,
)
from offload.tiers.context import RuntimeContext
from offload.tiers.device_tier import DeviceTier
from offload.tiers.disk_profile import DiskProfile
from offload.tiers.mover import Mover
from offload.tiers.state_home import page_bytes
from offload.tiers.swap_space import SwapSpace, profile_disks, store_memory
from offload.tiers.unified_tier import UnifiedTier
from offload.tiers.update_rates import measure_link, measure_update_rates
from offload.tiers.update_staging import open_pipeline


class Resources:
    """Chosen before anything is allocated; ``open`` allocates, all or nothing."""

    def __init__(self, policy: Policy, specs: Sequence[UnitSpec]) -> None:
        """Find the device, measure the disks where something must be spilled and make the plan.

        Raises:
            BudgetError: the smallest host or device budget that would do is larger than the
                policy's.
            PolicyError: the policy's device is not there.
            SwapIOError: a swap directory cannot be used.
        """
        self.policy = policy
        self.profiles: tuple[DiskProfile, ...] = ()
        self.update_note = ""
        self.torch_devices = torch_devices(policy)
        self._unified = shares_memory(policy, self.torch_devices)
        if self._unified and policy.update == "device":
            raise PolicyError(
                f'Policy(update="device"): {policy.device_names[0]} has the host\'s memory, where '
                'updates run on the CPU; use update="auto" or "cpu"'
            )
        self.link_rates = (0.0, 0.0)
        """Bytes per second to the device and from it, where activations are shared out by them."""
        must_spill = policy.budget.host_bytes < smallest_budget(specs, None)
        if must_spill or policy.moves_activations:
            self.profiles = profile_disks(policy)
        disk = self._disk_spec()
        updates = self._may_update_on_device(specs, disk)
        self.plan = place(
            specs,
            policy.budget.host_bytes,
            disk,
            self._activation_bytes(specs, disk, updates),
            updates,
        )
        self.device_plans: list[DevicePlan] = []
        if not policy.is_cpu and not self._unified:
            shares = _by_device(specs)
            for number, share in enumerate(shares):
                name = device_title(policy, number) if len(shares) > 1 else ""
                self.device_plans.append(
                    place_on_device(share, policy.budget.device_bytes, updates, name)
                )

    def _may_update_on_device(self, specs: Sequence[UnitSpec], disk: DiskSpec | None) -> bool:
        """Whether updates are to run on the device; with "auto" where there is room for that."""
        policy = self.policy
        if policy.update != "auto" or policy.is_cpu or self._unified:
            return policy.update == "device"
        host = smallest_budget(specs, disk, True) + self._activation_bytes(specs, disk, True)
        device = max(smallest_device_budget(share, True) for share in _by_device(specs))
        if policy.budget.host_bytes >= host and policy.budget.device_bytes >= device:
            return True
        self.update_note = (
            f"updates: all on the CPU; on the device they would need Budget(host={host}, "
            f"device={device})"
        )
        return False

    def _activation_bytes(
        self, specs: Sequence[UnitSpec], disk: DiskSpec | None, updates: bool
    ) -> int:
        policy = self.policy
        if not policy.moves_activations:
            return 0
        if policy.activation_bytes is not None:
            nbytes = parse_bytes(policy.activation_bytes)
        else:
            least = smallest_budget(specs, disk, updates)
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
        home_bytes = plan.pinned_bytes + plan.free_bytes
        opened = [
            ComputeDevice.open(policy, self.torch_devices[number], number)
            for number in range(max(1, len(self.device_plans)))
        ]
        devices = [device for device in opened if device is not None]
        pin = [device.native for device in devices] or None
        home = _native.HostArena(home_bytes, policy.debug, pin=pin)
        ring = None
        if plan.ring_bytes:
            ring = _native.HostArena(plan.ring_bytes, policy.debug, pin=pin)
        if store is not None:
            for arena in (home, ring):
                if arena is not None:
                    store.add_memory(arena)
        pipeline = open_pipeline(store, home, plan.staging_bytes)
        mover = Mover(home, ring, store, policy.debug)
        tiers: list[DeviceTier] = []
        if self._unified:
            tiers.append(UnifiedTier(devices[0], [home] if ring is None else [home, ring], mover))
        for device, device_plan in zip(devices, self.device_plans, strict=not self._unified):
            tiers.append(self._device_tier(device, device_plan, mover))
        context = RuntimeContext(policy, plan, mover, pipeline, space, tiers)
        if any(device_plan.updates for device_plan in self.device_plans):
            context.device_units = self._units_on(tiers, ring or home)
        return context

    def _units_on(self, tiers: Sequence[DeviceTier], host: _native.HostArena) -> frozenset[int]:
        """Return which units are updated on their device."""
        units = [placement.unit for placement in self.plan.placements]
        if self.policy.update == "device":
            return frozenset(range(len(units)))
        all_rates = [measure_update_rates(tier.device, tier.room.ring, host) for tier in tiers]
        split, rates = split_updates(units, all_rates), all_rates[0]
        trained = sum(unit.grad_bytes > 0 for unit in units)
        self.update_note = (
            f"updates: {len(split.on_device)} of {trained} units on the device, by rates of "
            f"{rates.cpu / 1e9:.1f} GB/s on the CPU and {rates.kernel / 1e9:.1f} there, "
            f"{rates.to_device / 1e9:.1f} to it and {rates.to_host / 1e9:.1f} back; "
            f"{split.device_seconds:.3f} s a step there, {split.cpu_seconds:.3f} on the CPU"
        )
        return split.on_device

    def _device_tier(self, device: ComputeDevice, plan: DevicePlan, mover: Mover) -> DeviceTier:
        home, ring = device.arenas(plan.home_bytes, plan.ring_bytes, self.policy.debug)
        return DeviceTier(device, home, ring, mover, self.policy.debug)

    def _activation_home(self, context: RuntimeContext, space: SwapSpace | None) -> ActivationHome:
        devices = [tier.compute for tier in context.tiers]
        pin = [device.native for device in devices] or None
        arena = _native.HostArena(self.plan.activation_bytes, self.policy.debug, pin=pin)
        tier = context.tiers[0] if context.tiers else None
        if tier is not None and not tier.shares_memory and self.policy.activations == "auto":
            self.link_rates = measure_link(tier.device, tier.room.ring, arena)
        if space is not None:
            space.store.add_memory(arena)
        return ActivationHome(
            arena,
            space,
            context.lock,
            eager=self.policy.activations != "host",
            leaves=self.policy.activations == "auto",
            owns_space=not self.plan.spills,
            devices=devices,
        )


def _by_device(specs: Sequence[UnitSpec]) -> list[list[UnitSpec]]:
    """Return the units of each device that has some."""
    count = 1 + max((spec.device for spec in specs), default=0)
    return [[spec for spec in specs if spec.device == number] for number in range(count)]
