"""DeviceUpdates: optimizer updates that run on the device.

Protocol of one:
 1. bring: what the job uses is copied to the device, and held there; the Prefetcher has begun that.
    Gradients whose copy is still there stay. A state that was never written is made there.
 2. launch: kernels on the compute stream, which waits for the copies; the host does not.
 3. send: the results go home to host memory and disk, each by itself, without Python. The
    parameters' copy stays, current, for the forward; the others are given up.
After that nothing is pending but transfers of slabs. Where Ctrl-C ends it, running it again does
what is left: copies count as newer than their slabs from before the launch until they were sent.
"""

from __future__ import annotations

from itertools import starmap

import torch

from offload import _native
from offload.errors import BudgetError, OffloadError
from offload.tiers.device_copy import DeviceCopy
from offload.tiers.device_tier import DeviceTier
from offload.tiers.slab import Residency, Slab
from offload.tiers.update_job import UpdateJob


class DeviceUpdates:
    """Runs jobs, each on its unit's device. Not thread-safe: the owner serialises.

    Attributes:
        done: how many units were updated.
        without_room: how many of the updates that were to run there had to be left to the CPU.
    """

    def __init__(self) -> None:
        """None was run."""
        self.done = 0
        self.without_room = 0

    def can_run(self, job: UpdateJob) -> bool:
        """Whether there are kernels for all of the job."""
        tier = job.unit.tier
        if tier is None:
            return False
        return _native.has_device_update(tier.device, job.layout.format, job.segments)

    def run(self, job: UpdateJob) -> bool:
        """Take the step. False: there is no room on the device now, and nothing was changed.

        Raises:
            OffloadError: what it uses could not be read.
        """
        tier = job.unit.tier
        if tier is None:
            raise OffloadError(f"{job.unit.name}: there is no device (internal error)")
        if not job.launched and not self._compute(job, tier):
            self.without_room += 1
            return False
        for slab in job.results:
            tier.send(slab)
        for slab in job.state:
            tier.drop(slab)
        self.done += 1
        return True

    def _compute(self, job: UpdateJob, tier: DeviceTier) -> bool:
        """Do steps 1 and 2; False when there is no room."""
        tier.room.held.update(job.slabs)
        try:
            copies = self._bring(job, tier)
            if copies is None:
                return False
            for slab in job.results:
                copies[slab].ahead = True
            self._launch(job, tier, copies)
            return True
        finally:
            tier.room.held.difference_update(job.slabs)

    def _bring(self, job: UpdateJob, tier: DeviceTier) -> dict[Slab, DeviceCopy] | None:
        """Return the copies of the job's slabs, ready for the compute stream, if there is room."""
        largest_first = sorted(job.slabs, key=lambda slab: -slab.nbytes)
        try:
            if not all(tier.bring(slab) for slab in largest_first):
                tier.room.clear()  # there is room, but in pieces
                if not all(tier.bring(slab) for slab in largest_first):
                    return None
        except BudgetError:  # of host memory, through which they come
            return None
        copies = {slab: tier.ready(slab, change=slab is not job.grads) for slab in job.slabs}
        for slab in job.state:
            if slab.residency is Residency.ABSENT and not copies[slab].ahead:
                self._make(job, tier, slab, copies)
        return copies

    @staticmethod
    def _make(job: UpdateJob, tier: DeviceTier, slab: Slab, copies: dict[Slab, DeviceCopy]) -> None:
        """Fill the copy of a state that was never written."""
        copy = copies[slab]
        if slab is not job.master:
            tier.device.fill(copy.lease, 0)
            return
        numel = slab.nbytes // torch.float32.itemsize
        params = copies[job.unit.param_slab].view(0, (numel,), (1,), job.layout.param)
        copy.view(0, (numel,), (1,), torch.float32).copy_(params)

    @staticmethod
    def _launch(job: UpdateJob, tier: DeviceTier, copies: dict[Slab, DeviceCopy]) -> None:
        leases = {slab: copies[slab].lease for slab in job.slabs}
        # Each notes at its end that the stream has used the lease.
        uses = [leases[slab].view("read" if slab is job.grads else "write") for slab in job.slabs]
        arguments = (
            tier.device,
            job.layout.format,
            job.segments,
            leases[job.unit.param_slab].address,
            leases[job.grads].address,
            0 if job.master is None else leases[job.master].address,
            [leases[slab].address for slab in job.states],
            [leases[slab].address for slab in job.scales],
            job.unit.name,
        )
        # Signal handlers run between C functions: it is never launched twice.
        job.launched.extend(starmap(_native.device_update, (arguments,)))
        del uses
