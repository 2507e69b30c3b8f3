"""StateSlabs: the slabs with the optimizer state of a run of elements, a unit's or a parameter's.

Parameters share the slabs of their run. Which of them has state there, and whose it is:
 1. an optimizer that has state to keep for a parameter becomes its tenant (occupy). Whoever was
    before is out, and finds out when it next asks (check): an optimizer that was thrown away needs
    nobody to clean up behind it, and of two that update one parameter the older gets an error.
 2. a tenant begins an array before its first use. Where a tenant before it left something, the
    array's part is filled; elsewhere it is zero bytes, whether it was ever written or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offload import _native
from offload.errors import BudgetError, OffloadError
from offload.tiers.slab import Residency, Slab
from offload.tiers.state_home import StateHome, page_bytes
from offload.tiers.state_layout import StateArray, StateLayout


@dataclass(eq=False)
class Tenant:
    """One optimizer's state of one parameter.

    Attributes:
        name: the parameter's, for messages.
        first: the parameter's first element in the run.
        numel: of the parameter.
        begun: the arrays that hold something.
    """

    name: str
    first: int
    numel: int
    begun: set[StateArray] = field(default_factory=set)


class StateSlabs:
    """Arrays of state for a run of `numel` elements, each in a slab of its own.

    Every use is to be under the home's lock, and with no update of the run in flight.
    """

    def __init__(self, what: str, numel: int, home: StateHome) -> None:
        """Hold nothing yet; `what` is whose state it is, for messages."""
        self.what = what
        self.numel = numel
        self.home = home
        self._slabs: dict[StateArray, Slab] = {}
        self._tenants: dict[int, Tenant] = {}
        self._used: set[tuple[int, StateArray]] = set()

    # -- tenants --------------------------------------------------------------------------------

    def occupy(self, name: str, first: int, numel: int) -> Tenant:
        """Make a new tenant of the parameter at element `first`."""
        tenant = Tenant(name, first, numel)
        self._tenants[first] = tenant
        return tenant

    def check(self, tenant: Tenant) -> None:
        """Raise OffloadError when another optimizer has taken over."""
        if self._tenants.get(tenant.first) is not tenant:
            raise OffloadError(
                f"another optimizer has updated {tenant.name} since, and keeps its state now; one "
                "optimizer at a time can update a parameter (load_state_dict() starts anew)"
            )

    def tenant_at(self, first: int) -> Tenant | None:
        """Return who has the state of the parameter at element `first`, if anybody."""
        return self._tenants.get(first)

    def begin(self, tenant: Tenant, array: StateArray, values: torch.Tensor | None) -> None:
        """Let `tenant` use `array`, which holds `values` (flat; None: zero bytes)."""
        part = (tenant.first, array)
        if values is not None:
            self.write(tenant, array, values)
        elif part in self._used:
            self.write(tenant, array, torch.zeros(array.numel(tenant.numel), dtype=array.dtype))
        self._used.add(part)
        tenant.begun.add(array)

    def adopt(self, tenant: Tenant, array: StateArray) -> None:
        """Let `tenant` use `array` as it is."""
        self._used.add((tenant.first, array))
        tenant.begun.add(array)

    def begin_master(self, tenant: Tenant, array: StateArray, values: torch.Tensor) -> None:
        """Let `tenant` use `array`, a master copy of `values`, flat; see is_unwritten()."""
        if self.is_unwritten(array):
            self.adopt(tenant, array)
        else:
            self.begin(tenant, array, values)

    def is_unwritten(self, array: StateArray) -> bool:
        """Whether `array` is on disk, out of reach of this process's memory, and holds nothing.

        The first update takes the parameters, widened, for a master copy that is.
        """
        slab = self._slabs[array]
        return not self._can_hold(slab) and slab.residency is Residency.ABSENT

    # -- bytes ----------------------------------------------------------------------------------

    def read(self, tenant: Tenant, array: StateArray) -> torch.Tensor:
        """Return a flat copy of what `array` holds for `tenant`."""
        slab = self._slabs[array]
        if self._can_hold(slab):
            return self._part(self._held(slab), tenant, array).clone()
        whole = self.home.copy_out(slab).view(array.dtype)
        return whole[self._range(tenant, array)].clone()

    def alias(self, tenant: Tenant, array: StateArray) -> torch.Tensor:
        """Return the memory of what `array`, whose slab is pinned, holds for `tenant`, flat."""
        return self._part(self._held(self._slabs[array]), tenant, array)

    def write(self, tenant: Tenant, array: StateArray, values: torch.Tensor) -> None:
        """Replace what `array` holds for `tenant` by `values`, flat."""
        slab = self._slabs[array]
        if self._can_hold(slab):
            self._part(self._held(slab), tenant, array).copy_(values)
            self.home.mover.mark_dirty(slab)
            return
        whole = self.home.copy_out(slab)
        whole.view(array.dtype)[self._range(tenant, array)].copy_(values)
        self.home.copy_in(slab, whole)

    def to_write(self, tenant: Tenant, array: StateArray) -> torch.Tensor:
        """Return the bytes of `array` for `tenant`, flat, in memory, to be changed at once."""
        slab = self._held(self._slabs[array])
        self.home.mover.mark_dirty(slab)
        return self._part(slab, tenant, array)

    def write_back(self, array: StateArray) -> None:
        """Start writing what was changed of `array`."""
        self.home.mover.write_back(self._slabs[array])

    def _can_hold(self, slab: Slab) -> bool:
        return slab.pinned or self.home.mover.ring is not None

    def _held(self, slab: Slab) -> Slab:
        """Have `slab` in memory, zero bytes at first, and no transfer of it in flight."""
        mover = self.home.mover
        if slab.residency is Residency.ABSENT:
            mover.hold_new(slab)
            slab.zero()
        mover.fetch(slab)
        mover.settle(slab)
        return slab

    def _range(self, tenant: Tenant, array: StateArray) -> slice:
        first = tenant.first // array.per
        return slice(first, first + array.numel(tenant.numel))

    def _part(self, slab: Slab, tenant: Tenant, array: StateArray) -> torch.Tensor:
        offset = tenant.first // array.per * array.dtype.itemsize
        return slab.view(offset, (array.numel(tenant.numel),), (1,), array.dtype)

    # -- updates --------------------------------------------------------------------------------

    def of(self, layout: StateLayout, whole: bool = True) -> list[Slab]:
        """Return the slabs of `layout`: scales, then the master copy, then states.

        Args:
            layout: whose slabs exist.
            whole: the update will write all of them; else what was never written is made zero here,
                since a slab on disk can be read as a whole only.
        """
        mover = self.home.mover
        slabs = [self._slabs[array] for array in layout.arrays]
        for slab in slabs:
            if slab.residency is Residency.ABSENT and (slab.pinned or not whole):
                mover.hold_new(slab)
                slab.zero()
                mover.write_back(slab)
        return slabs

    @property
    def disk_bytes(self) -> int:
        """Bytes of its slabs that live on disk."""
        return sum(slab.nbytes for slab in self._slabs.values() if not slab.pinned)

    @property
    def is_occupied(self) -> bool:
        """Whether an optimizer has, or had, state in it."""
        return bool(self._tenants)

    def missing(self, layout: StateLayout) -> list[StateArray]:
        """Return the arrays of `layout` that have no slab yet."""
        return [array for array in layout.arrays if array not in self._slabs]

    def add(self, array: StateArray, slab: Slab) -> None:
        """Let `slab`, which holds nothing, be that of `array`."""
        self._slabs[array] = slab


def operand(slab: Slab) -> _native.UpdateOperand:
    """Return where an update finds the bytes of `slab`."""
    if slab.residency is Residency.HOST and slab.lease is not None:
        return _native.UpdateOperand.in_memory(slab.lease, slab.nbytes)
    if slab.swap_object is None:
        raise OffloadError(f"{slab.name} is neither in memory nor on disk (internal error)")
    return _native.UpdateOperand.on_disk(slab.swap_object, slab.nbytes)


def provide(wanted: Sequence[tuple[StateSlabs, StateLayout]]) -> None:
    """Make the slabs that `wanted` lacks, all of them or none; what comes first is pinned first.

    Args:
        wanted: runs of one home, with the layout that an update will need.

    Raises:
        BudgetError, SwapSpaceError: there is no room; nothing was changed.
    """
    new = dict.fromkeys((run, array) for run, layout in wanted for array in run.missing(layout))
    made: list[tuple[StateSlabs, StateArray, Slab]] = []
    if new:
        home = next(iter(new))[0].home
        home.check_room([array.nbytes(run.numel) for run, array in new], "optimizer state")
    try:
        for run, array in sorted(new, key=lambda item: not item[1].in_memory):
            made.append((run, array, _make(run, array)))
    except BaseException:
        for run, _, slab in made:
            run.home.free_slab(slab)
        raise
    for run, array, slab in made:
        run.add(array, slab)


def _make(run: StateSlabs, array: StateArray) -> Slab:
    home, nbytes = run.home, array.nbytes(run.numel)
    name = f"{array.name} of {run.what}"
    if array.in_memory and page_bytes(nbytes) > home.room:
        raise BudgetError(
            f"no room for {name}: {nbytes} bytes are needed in memory, {home.room} are left of the "
            "host budget for optimizer state; raise Budget(host=...)"
        )
    return home.make_slab(name, nbytes, array.name)
