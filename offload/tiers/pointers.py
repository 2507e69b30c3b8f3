"""Pointers: what the parameters' ``.data`` is, and whether somebody wrote to it."""

from __future__ import annotations

import torch

from offload.tiers.mover import Mover
from offload.tiers.slab import Residency
from offload.tiers.unit import (
    OffloadedParam,
    RowsParameter,
    SpilledParameter,
    SpreadParameter,
    Unit,
)


class Pointers:
    """Points parameters at the bytes of their units, where the compute uses them, and away again.

    Attributes:
        by_address: attached parameters by the address of their memory.
    """

    def __init__(self, mover: Mover) -> None:
        """The compute uses the slabs of `mover`, or copies of them on the units' devices."""
        self._mover = mover
        self.by_address: dict[int, OffloadedParam] = {}

    def view(self, param: OffloadedParam) -> torch.Tensor:
        """Return the bytes of a parameter that is loaded for the compute."""
        tier = param.unit.tier
        if tier is None:
            return param.view(param.unit.param_slab)
        copy = tier.fetch(param.unit.param_slab)
        return copy.view(param.offset, param.shape, param.stride, param.dtype)

    def stays(self, unit: Unit) -> bool:
        """Whether the unit is attached for good."""
        return unit.tier is None and unit.param_slab.pinned

    def point(self, param: OffloadedParam) -> None:
        """Let the parameter, which is loaded for the compute, be its bytes there."""
        view = self.view(param)
        with torch._C.DisableTorchFunctionSubclass():
            param.param.data = view
        kind: type[torch.nn.Parameter] = torch.nn.Parameter
        if param.unit.param_slab.residency is Residency.PARTIAL:
            kind = RowsParameter
        elif param.unit.spread:
            kind = SpreadParameter
        param.param.__class__ = kind
        if param.numel:  # one without elements lies nowhere
            self.by_address[view.data_ptr()] = param

    def renew(self, unit: Unit) -> None:
        """The slab of the unit, which is attached and loaded, has new values: show them."""
        if unit.tier is not None:
            for param in unit.params:
                self.view(param).copy_(param.view(unit.param_slab))
            unit.tier.note_renewed(unit.param_slab)

    def hide(self, param: OffloadedParam) -> None:
        """Make the attached parameter a placeholder."""
        self.by_address.pop(self.address_of(param), None)
        self.blank(param)

    def note_complete(self, unit: Unit) -> None:
        """More of the unit, which is attached, is in memory: perhaps all of it."""
        if unit.param_slab.residency is not Residency.PARTIAL:
            for param in unit.params:
                if type(param.param) is RowsParameter:
                    param.param.__class__ = torch.nn.Parameter  # type: ignore[assignment]

    @staticmethod
    def address_of(param: OffloadedParam) -> int:
        """Return where the parameter's ``.data`` is."""
        with torch._C.DisableTorchFunctionSubclass():
            return param.param.data_ptr()

    @staticmethod
    def blank(param: OffloadedParam) -> None:
        """Make a parameter a placeholder that was never attached.

        The class comes first: another thread may use the parameter between any two lines, and one
        of its own class is taken to have its bytes.
        """
        param.param.__class__ = SpilledParameter
        with torch._C.DisableTorchFunctionSubclass():
            param.param.data = param.placeholder

    def note_version(self, unit: Unit) -> None:
        """Take what the parameters, which are attached, hold now for unchanged."""
        unit.seen_version = sum(p.param._version for p in unit.params)

    def note_changes(self, unit: Unit) -> None:
        """See whether the user changed the parameters, which are attached, and keep what is new."""
        version = sum(p.param._version for p in unit.params)
        start = self.start_of(unit)
        replaced = [
            p
            for p in unit.params
            if type(p.param) is not SpilledParameter
            and self.address_of(p) not in (p.address(start), p.placeholder.data_ptr())
        ]
        for param in replaced:  # by assigning to .data
            self.view(param).copy_(param.param.data)
            self.point(param)
        if replaced or version != unit.seen_version:
            self.keep_changes(unit)  # first: Ctrl-C there leaves them to be seen again
            unit.seen_version = version
            unit.version += 1
            unit.written = True

    def keep_changes(self, unit: Unit) -> None:
        """The unit's parameters, which are attached, were changed: what was there is not theirs."""
        if unit.tier is not None:
            unit.tier.pull(unit.param_slab)
        else:
            self._mover.mark_dirty(unit.param_slab)

    def start_of(self, unit: Unit) -> int:
        """Return the address of the parameters of `unit`, which is attached."""
        copy = None if unit.tier is None else unit.tier.copy_of(unit.param_slab)
        return unit.param_slab.address if copy is None else copy.lease.address

    def note_update(self, unit: Unit) -> None:
        """Take note of a step that changed parameters in memory, and their fp32 copies alike.

        The copies had followed what was written before.
        """
        self.note_changes(unit)
        unit.written = False
