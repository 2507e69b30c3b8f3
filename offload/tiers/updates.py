"""Updates: the optimizer updates of a model's units, from step() until they are done.

Protocol of the lazy step:
 1. put_off: gradients, factors and hyperparameters are final, the unit's parameters are detached.
    Nothing runs yet; gradients that only the update still needs count as wanted.
 2. start: a native job owns the slabs. It follows what is in flight, such as the gradients' copy
    from the device, without Python: nobody waits here. Parameters that are in memory are updated
    there. Spilled ones are read by the job into memory that was taken for them, and stay there, so
    that the forward reads nothing again; the new version is on disk as well, and the memory may be
    given up at any time. Units are started in the order of their next use, as far ahead as the ring
    has room (Prefetcher), and at the latest when they are needed.
 3. finish: wait for the job, and so for what it followed, of which note is taken now unless that
    was done before; the slabs are ordinary again. Where a copy failed the job did nothing and has
    failed with that error, which every later use of the unit raises.
A job that is to run on the device does so when it is started, and nothing waits for it
(device_updates.py); what it uses is copied there ahead. Where there is no room it is native's.
Whoever needs a unit's parameters, gradients or states calls finish() first, so nobody can tell when
the update ran. flush() starts all that is left without memory for parameters, and finishes it.
"""

from __future__ import annotations

from itertools import starmap

from offload import _native
from offload.errors import OffloadError
from offload.tiers.device_updates import DeviceUpdates
from offload.tiers.eviction import NEVER
from offload.tiers.mover import Mover
from offload.tiers.slab import Arrival, Residency, Slab
from offload.tiers.state_slabs import operand
from offload.tiers.unit import Unit
from offload.tiers.update_job import UpdateJob


class Updates:
    """What was put off and what is running. Not thread-safe: the owner serialises.

    Attributes:
        running: units whose job the pipeline has.
        on_device: runs jobs on the device; None: there is none.
    """

    def __init__(self, mover: Mover, pipeline: _native.UpdatePipeline, has_devices: bool) -> None:
        """No update is pending yet; `has_devices`: units are used on devices."""
        self._mover = mover
        self._pipeline = pipeline
        self.on_device = DeviceUpdates() if has_devices else None
        self._waiting: dict[Unit, UpdateJob] = {}
        self._submitted: dict[Unit, list[_native.Transfer]] = {}  # those that still wait too
        self.running: dict[Unit, None] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self.running)

    @property
    def waiting(self) -> list[Unit]:
        """Units whose update was put off and has not started."""
        return list(self._waiting)

    def put_off(self, job: UpdateJob) -> None:
        """Note an update."""
        unit = job.unit
        self._submitted.pop(unit, None)  # that of an earlier update, which is done
        unit.update_slabs = job.slabs
        unit.update_waits = True
        self._waiting[unit] = job

    def for_device(self, unit: Unit) -> list[Slab]:
        """Return what the update of `unit` will use on the device; none if it runs elsewhere."""
        job = self._waiting.get(unit)
        return job.slabs if job is not None and job.on_device else []

    def start_ahead(self, unit: Unit, use: int) -> bool:
        """Start the update of `unit`, needed at use number `use` from now, if that does no harm.

        Returns False when there is no room for its parameters that may be taken.
        """
        if self.for_device(unit):
            return True  # it starts when it is needed
        slab = unit.param_slab
        fixed = slab.residency is Residency.HOST or self._submitted.get(unit)
        if not fixed and not self._mover.take_ahead(slab, use):
            return False
        self._start(unit)
        return True

    def start(self, unit: Unit) -> None:
        """Start the update of `unit`; parameters that are on disk stay there."""
        if unit.update_waits and not self._runs_on_device(unit):
            self._start(unit)

    def finish(self, unit: Unit, load: bool = False) -> None:
        """Have the update of `unit` done; with `load`, its parameters in memory if it had to run.

        Raises:
            OffloadError: the update failed.
        """
        if unit.update_waits and not self._runs_on_device(unit):
            fixed = unit.param_slab.residency is Residency.HOST or self._submitted.get(unit)
            if load and not fixed:
                self._mover.take(unit.param_slab)
            self._start(unit)
        if unit.update is None:
            return
        self._mover.wait(unit.update, "update")  # Ctrl-C here leaves it pending
        for slab in unit.update_slabs:
            self._mover.settle(slab)  # what the job followed has ended
        unit.update = None
        self.running.pop(unit, None)
        params, *others = unit.update_slabs
        unit.update_slabs = []
        for slab in (params, *others):
            slab.locks -= 1
        for slab in others:
            if slab is unit.grad_slab:
                continue
            if slab.lease is not None:
                self._mover.mark_dirty(slab)
            else:
                self._mover.mark_on_disk(slab)
        if params.residency is Residency.HOST:
            self._mover.mark_dirty(params)
        elif params.lease is not None:
            self._mover.mark_loaded(params)
        else:
            self._mover.mark_on_disk(params)
        if not params.pinned:
            self._mover.write_back(params)

    def flush(self) -> None:
        """Finish all: afterwards everything is as after an eager step."""
        waiting = self.waiting
        for i, unit in enumerate(waiting):
            for near in waiting[i : i + 2]:  # the next one's copies arrive while this one runs
                if near.tier is not None:
                    for slab in self.for_device(near):
                        near.tier.prefetch(slab, NEVER)
            self.start(unit)
        for unit in list(self.running):
            self.finish(unit)

    def _runs_on_device(self, unit: Unit) -> bool:
        """Run the job of `unit`, which waits, on the device, if it is to and there is room."""
        job = self._waiting.get(unit)  # None where Ctrl-C came after it was submitted
        if job is None or not job.on_device or self.on_device is None:
            return False
        if not self.on_device.run(job):
            job.on_device = False
            if unit.tier is not None:
                unit.tier.drop(unit.param_slab)
            return False
        unit.update_slabs = []
        unit.update_waits = False
        self._waiting.pop(unit, None)
        return True

    def _start(self, unit: Unit) -> None:
        """Submit the job of `unit` and note it; where Ctrl-C came in between, do what is left."""
        if not self._submitted.get(unit):
            self._submit(unit)
        unit.update = self._submitted[unit][0]
        self.running[unit] = None
        self._waiting.pop(unit, None)
        unit.update_waits = False
        del self._submitted[unit]

    def _submit(self, unit: Unit) -> None:
        if unit.tier is not None:  # to be changed here
            unit.tier.send(self._waiting[unit].grads, to_disk=False)
            for slab in (self._waiting[unit].grads, *self._waiting[unit].state):
                unit.tier.drop(slab)
        after: list[Arrival] = []
        for slab in unit.update_slabs:
            after += self._mover.in_flight(slab)
        params = self._params(unit.param_slab)
        job = self._waiting[unit].prepare(self._pipeline, params, after)
        submitted = self._submitted.setdefault(unit, [])
        before = [slab.locks for slab in unit.update_slabs]
        try:
            for slab in unit.update_slabs:
                slab.locks += 1
            # Signal handlers run between C functions: Ctrl-C comes before the job is submitted or
            # after it was noted, and it is never submitted twice.
            submitted.extend(starmap(job, ((),)))
        finally:
            if not submitted:
                for slab, locks in zip(unit.update_slabs, before, strict=True):
                    slab.locks = locks

    def _params(self, slab: Slab) -> _native.UpdateOperand:
        if slab.residency is Residency.HOST or slab.lease is None:
            return operand(slab)
        if slab.swap_object is None:
            raise OffloadError(f"{slab.name} has no place on disk (internal error)")
        return _native.UpdateOperand.loaded(slab.swap_object, slab.lease, slab.nbytes)
