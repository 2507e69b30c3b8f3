"""What must follow when the values of parameters were replaced from outside of an update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from offload.tiers.masters import MASTER_ARRAY, copy_values, read_master, write_master
from offload.tiers.unit import OffloadedParam, Unit

if TYPE_CHECKING:
    from offload.tiers.context import RuntimeContext


def has_masters(unit: Unit) -> bool:
    """Whether there are fp32 copies of parameters of `unit`."""
    return any(_has_master(unit, param) for param in unit.params)


def sync_masters(context: RuntimeContext, unit: Unit) -> None:
    """Have the fp32 copies follow what was written to the unit's parameters since they last did."""
    context.settle(unit)
    if unit.attached:
        context.pointers.note_changes(unit)
    if unit.holders or unit.written:
        refresh_masters(context, unit)


def masters_of(context: RuntimeContext, params: Sequence[OffloadedParam]) -> list[torch.Tensor]:
    """Return copies of the masters of `params`, all narrowed and of one unit, as they are now."""
    unit = params[0].unit
    sync_masters(context, unit)
    if context.pointers.stays(unit):  # it stays attached, and writes to .data are not seen
        for param in params:
            _refresh(context, unit, param)
    return [read_master(context, param) for param in params]


def refresh_masters(context: RuntimeContext, unit: Unit) -> None:
    """Have the fp32 copies of the unit's 16-bit parameters say what the parameters say.

    An update starts from the copy, so it would undo a change of the parameter alone. Where the
    copy still rounds to the parameter it keeps its bits.
    """
    for param in unit.params:
        if _has_master(unit, param):
            _refresh(context, unit, param)
    unit.written = False


def _has_master(unit: Unit, param: OffloadedParam) -> bool:
    if param.is_narrowed:
        return True
    tenant = None if unit.state is None else unit.state.tenant_at(param.first)
    return param.trainable and tenant is not None and MASTER_ARRAY in tenant.begun


def _refresh(context: RuntimeContext, unit: Unit, param: OffloadedParam) -> None:
    if not param.numel:
        return
    with context.held(unit):
        context.load(unit)
        values = param.view(unit.param_slab).as_strided((param.numel,), (1,)).clone()
    master = read_master(context, param)
    flat = master.as_strided((param.numel,), (1,))
    changed = flat.to(values.dtype).view(torch.int16) != values.view(torch.int16)
    if changed.any():
        flat[changed] = values[changed].float()
        write_master(context, param, partial(copy_values, master))
