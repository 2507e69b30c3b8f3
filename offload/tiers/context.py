"""RuntimeContext: everything one wrapped model shares, and the operations on its units.

Life of a unit's parameters:
 1. attach: any pending update is finished, the bytes are fetched, ``.data`` of each parameter is
    pointed at the slab. Pinned units stay attached.
 2. detach: ``.data`` becomes one NaN expanded to the shape and the class SpilledParameter, so that
    whoever touches the parameter is noticed. The slab stays in memory until its place is needed.
 3. begin_update: detach, and put the update off (updates.py); settle() has it done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from offload import _native
from offload.errors import OffloadError
from offload.planner import Plan
from offload.policy import Policy
from offload.tiers.activation_home import ActivationHome
from offload.tiers.changed_values import sync_masters
from offload.tiers.device_tier import DeviceTier
from offload.tiers.gradients import Gradients
from offload.tiers.joined_tiers import join_tiers
from offload.tiers.masters import seed_masters
from offload.tiers.mover import Mover
from offload.tiers.pointers import Pointers
from offload.tiers.prefetcher import Prefetcher
from offload.tiers.scopes import ForwardScopes
from offload.tiers.slab import Residency, Slab
from offload.tiers.state_home import StateHome
from offload.tiers.state_layout import StateLayout
from offload.tiers.state_slabs import StateSlabs
from offload.tiers.swap_space import SwapSpace
from offload.tiers.unit import Rows, SpilledParameter, Unit
from offload.tiers.update_job import UpdateJob
from offload.tiers.updates import Updates
from offload.tiers.weight_files import WeightFiles, note_origin, origins_of, take_from_file
from offload.trace import Phase, Use


class RuntimeContext:
    """State shared by all units of one wrapped model.

    Attributes:
        scopes: the modules that are in forward at the moment, and the units they hold.
        gradients: of its units.
        pointers: where their parameters' ``.data`` is.
        tiers: of the devices that units are computed with; none: in host memory.
        space: the swap space that its slabs on disk live in; None: nothing spills.
        state_home: StateHome.of_context() makes it.
        activations: where saved activations are; None: autograd keeps them.
        resident: everything stays in memory, so parameters and gradients are ordinary tensors
            throughout: nobody has to be told of a use, and no hooks are needed.
        weight_files: what reads units from files of others; None: there are no such units.
        device_units: indices of the units whose updates run on the device, where it has kernels.
        reading_out: detach() of a spilled parameter returns a copy (state_dict is being made).
        saved_hooks: a context in which autograd saves no parameter that is about to be detached.
    """

    def __init__(
        self,
        policy: Policy,
        plan: Plan,
        mover: Mover,
        pipeline: _native.UpdatePipeline,
        space: SwapSpace | None,
        tiers: Sequence[DeviceTier] = (),
    ) -> None:
        """Own the native objects; units are added with add_unit()."""
        self.policy = policy
        self.plan = plan
        self.store = mover.store
        self.space = space
        self.tiers = tuple(tiers)
        self.resident = space is None and policy.activations == "keep" and not tiers
        self.state_home: StateHome | None = None
        self.activations: ActivationHome | None = None
        self.pipeline = pipeline
        self.lock = threading.RLock()
        self.mover = mover
        self.mover.relieve = self._relieve
        self.mover.readers = join_tiers(self.tiers)
        for tier in self.tiers:
            tier.room.relieve = self._relieve
        self.mover.find_place = self._place_for
        self.weight_files: WeightFiles | None = None
        self.updates = Updates(mover, pipeline, bool(tiers))
        self.device_units: frozenset[int] = frozenset()
        copied_to = [tier for tier in self.tiers if not tier.shares_memory]
        self.prefetcher = Prefetcher(plan, mover, self.updates, copied_to)
        self.units: list[Unit] = []
        self.gradients = Gradients(self)
        self.scopes = ForwardScopes()
        self.pointers = Pointers(mover)
        self.reading_out = False
        self.saved_hooks: Callable[[], AbstractContextManager[None]] = nullcontext
        self.closed = False

    # -- building -------------------------------------------------------------------------------

    def add_unit(self, unit: Unit) -> None:
        """Take over the unit's values: copy them to their slab and free the original tensors.

        Whatever can fail has failed before the first of its parameters is changed.
        """
        seed_masters(self, unit)
        placement = self.plan.placements[unit.index]
        if self.tiers:
            unit.tier = self.tiers[placement.unit.device]
        origins = None if placement.pin_params else origins_of(unit)
        unit.param_slab = self._slab(
            unit, "parameters", unit.param_bytes, placement.pin_params, is_stored=origins is None
        )
        if unit.grad_bytes:
            unit.grad_slab = self._slab(unit, "gradients", unit.grad_bytes, placement.pin_grads)
            unit.grad_slab.live = unit.grads_wanted
        if origins is None or not take_from_file(self, unit, origins):
            self.mover.hold_new(unit.param_slab)
            for param in unit.params:
                param.view(unit.param_slab).copy_(param.param.detach())
        self.units.append(unit)
        self.prefetcher.add(unit)
        if unit.tier is not None and placement.unit.nested:
            for slab in (unit.param_slab, unit.grad_slab):
                if slab is not None:
                    unit.tier.keep_at_home(slab)
        for param in unit.params:
            note_origin(param.param, None)
            param.take_over()
            if unit.tier is None:
                self.pointers.point(param)
                continue
            grad, param.param.grad = param.param.grad, None
            self.pointers.blank(param)
            if grad is not None:
                param.param.grad = grad.to(param.device)
        unit.attached = unit.tier is None
        self.pointers.note_version(unit)
        if not placement.pin_params:
            self.detach(unit)
            self.mover.write_back(unit.param_slab)

    def state_of(self, unit: Unit) -> StateSlabs:
        """Return where the optimizer state of `unit` is; no update of it is in flight then."""
        self.settle(unit)
        if unit.state is None:
            numel = unit.grad_bytes // unit.params[0].dtype.itemsize
            unit.state = StateSlabs(unit.name, numel, StateHome.of_context(self))
        return unit.state

    def state_on_disk(self) -> tuple[int, ...] | None:
        """Return the bytes of optimizer state on disk, by unit; None before any was made."""
        states = [unit.state for unit in self.units]
        if not any(state is not None and state.is_occupied for state in states):
            return None
        return tuple(0 if state is None else state.disk_bytes for state in states)

    def files(self) -> WeightFiles:
        """Return what reads units from files of others; opened when there first are any."""
        if self.weight_files is None:
            self.weight_files = WeightFiles(self.policy)
        return self.weight_files

    def _slab(
        self, unit: Unit, kind: str, nbytes: int, pinned: bool, is_stored: bool = True
    ) -> Slab:
        """Return a new slab; one that is neither pinned nor stored gets its place when written."""
        slab = Slab(f"{kind} of {unit.name}", kind, nbytes, pinned, None)
        if not pinned and is_stored:
            slab.swap_object = self._place_for(slab)
        return slab

    def _place_for(self, slab: Slab) -> int:
        if self.space is None:
            raise OffloadError(f"{slab.name}: no swap store to spill to (internal error)")
        return self.space.create(slab.nbytes)

    # -- parameters -----------------------------------------------------------------------------

    def attach(self, unit: Unit, rows: Rows = None) -> None:
        """Have the unit's parameters usable: current bytes, in memory, of those `rows` at least."""
        if unit.attached and not unit.updating:
            if unit.param_slab.residency is Residency.PARTIAL:
                self.load(unit, rows)
                self.pointers.note_complete(unit)
            return
        self.load_for_compute(unit, rows)
        start = self.pointers.start_of(unit)
        for param in unit.params:  # not those that are right: another thread may compute with them
            if not unit.attached or self.pointers.address_of(param) != param.address(start):
                self.pointers.point(param)
        unit.attached = True
        self.pointers.note_version(unit)

    def load(self, unit: Unit, rows: Rows = None) -> None:
        """Have the current bytes of the unit's parameters in host memory, or those of `rows`."""
        self.updates.finish(unit, load=True)
        self.mover.fetch(unit.param_slab, unit.ranges(rows))

    def load_for_compute(self, unit: Unit, rows: Rows = None) -> None:
        """Have them where the compute uses them, which is to hold the unit meanwhile."""
        if unit.tier is None:
            self.load(unit, rows)
        else:
            self.updates.finish(unit, load=True)
            unit.tier.fetch(unit.param_slab)

    def detach(self, unit: Unit) -> None:
        """Make the unit's parameters placeholders again; the slab stays as it is."""
        if not unit.attached:
            return
        self.pointers.note_changes(unit)
        for param in unit.params:
            if type(param.param) is SpilledParameter:
                continue  # Ctrl-C ended an earlier detach here
            self.pointers.hide(param)
        unit.attached = False

    def goes_by_row(self, unit: Unit) -> bool:
        """Whether a use of some rows of `unit` need not fetch the others."""
        return unit.by_row and unit.tier is None and not unit.param_slab.pinned

    def acquire(self, unit: Unit, phase: Phase, rows: Rows = None) -> None:
        """Attach `unit`, or `rows` of it, for a use in forward and hold it until release()."""
        unit.param_slab.locks += 1
        unit.forward_locks += 1
        try:
            self.prefetcher.advance(Use(unit.index, phase))
            self.attach(unit, rows)
        except BaseException:
            unit.param_slab.locks -= 1
            unit.forward_locks -= 1
            raise

    def join_scope(self, units: list[Unit]) -> None:
        """Acquire `units` until the innermost scope ends, or until there is no room for others."""
        scope = self.scopes.mine[-1]
        for unit in units:
            self.acquire(unit, Phase.FORWARD)
        scope.touched += units

    def release(self, unit: Unit) -> None:
        """End a use begun by acquire()."""
        unit.param_slab.locks -= 1
        unit.forward_locks -= 1
        self.rest(unit)

    def rest(self, unit: Unit) -> None:
        """Nobody holds the unit any more, perhaps: leave it ready for eviction."""
        if unit.forward_locks or unit.holders or unit.updating or self.pointers.stays(unit):
            return
        self.detach(unit)
        if not unit.in_backward and not unit.param_slab.pinned:
            self.mover.write_back(unit.param_slab)

    # -- updates --------------------------------------------------------------------------------

    def begin_resident_update(self, unit: Unit) -> None:
        """See to it that the unit's slabs hold what an update in place starts from."""
        sync_masters(self, unit)

    def end_resident_update(self, unit: Unit) -> None:
        """The unit's parameters were updated in place."""
        unit.version += 1
        self.pointers.note_version(unit)

    def begin_update(
        self,
        unit: Unit,
        layout: StateLayout,
        seed: int,
        segments: list[_native.UpdateSegment],
    ) -> None:
        """Note an update of some of the unit's parameters; end_step() lets it run.

        Args:
            unit: its gradients are in its slab.
            layout: of their state, whose slabs exist.
            seed: of stochastic rounding.
            segments: one per parameter, ascending.
        """
        sync_masters(self, unit)
        whole = len(segments) == len(unit.trainable)
        state, grads = self.state_of(unit).of(layout, whole=whole), self.gradients.slab(unit)
        job = UpdateJob(unit, grads, layout, state, seed, segments)
        # Operators that another thread runs on the parameters must not lose them: they stay
        # attached, and the update is done at once. Some of the new values may be seen there.
        held_elsewhere = unit.attached and self.scopes.others_hold(unit)
        self.prefetcher.end_step()
        if not held_elsewhere:
            self.detach(unit)
            on_device = self.updates.on_device if unit.index in self.device_units else None
            job.on_device = on_device is not None and on_device.can_run(job)
            if unit.tier is not None and not job.on_device:
                unit.tier.drop(unit.param_slab)
        self.updates.put_off(job)
        unit.version += 1
        if held_elsewhere:
            self.load(unit)
            self.pointers.renew(unit)

    def end_step(self) -> None:
        """All updates of a step were begun: run them, or let them run as they are needed."""
        if self.policy.lazy_step:
            self.prefetcher.start_updates()
        else:
            self.flush()
        for unit in self.units:
            if unit.holders:
                self.attach(unit)

    def settle(self, unit: Unit) -> None:
        """Have the unit's pending update done. Raises the update's error."""
        self.updates.finish(unit)

    def flush(self) -> None:
        """Finish all pending updates: afterwards everything is as after an eager step."""
        self.updates.flush()

    def _relieve(self) -> bool:
        """Make a user of memory let go: an update by waiting, others by fetching again later."""
        for unit in self.updates.running:
            self.settle(unit)
            return True
        for unit in self.gradients.in_backward:
            self.gradients.end_unit_backward_partially(unit)
            return True
        for scope in self.scopes.mine:
            if scope.touched:
                self.release(scope.touched.pop(0))
                return True
        return False

    # -- interruption and the end ---------------------------------------------------------------

    def recover(self) -> None:
        """Forget who was using what: a forward or backward ended by an exception or Ctrl-C.

        This thread's scopes are closed. What an interruption left locked without a scope is
        released when no other thread is in forward.
        """
        for unit in self.units:
            if self.scopes.none_open:
                unit.param_slab.locks -= unit.forward_locks
                unit.forward_locks = 0
            self.gradients.end_unit_backward_partially(unit)

    @contextmanager
    def held(self, unit: Unit) -> Iterator[None]:
        """Attach `unit` within a block, outside of any recorded use."""
        unit.param_slab.locks += 1
        unit.forward_locks += 1
        try:
            self.attach(unit)
            yield
        finally:
            unit.param_slab.locks -= 1
            unit.forward_locks -= 1
            self.rest(unit)

    def hold(self, unit: Unit) -> None:
        """Attach `unit` until let_go(), whatever else uses it meanwhile."""
        unit.param_slab.locks += 1
        unit.holders += 1
        try:
            self.attach(unit)
        except BaseException:
            self.let_go(unit)
            raise

    def let_go(self, unit: Unit) -> None:
        """End what hold() began."""
        unit.param_slab.locks -= 1
        unit.holders -= 1
        self.rest(unit)

    def close(self) -> None:
        """Finish what is pending and give everything back. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self.state_home is not None:
            self.state_home.close()
        if self.activations is not None:
            self.activations.close()
        for tier in self.tiers:
            tier.close()
        self.pipeline.close()
        if self.weight_files is not None:
            self.weight_files.close()
        if self.store is not None:
            self.store.close()
