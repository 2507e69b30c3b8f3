"""What must follow when the values of parameters were replaced from outside of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offload.tiers.state_layout import MASTER, StateArray
from offload.tiers.unit import OffloadedParam, Unit

if TYPE_CHECKING:
    from offload.tiers.context import RuntimeContext

_MASTER = StateArray(MASTER, torch.float32)


def has_masters(unit: Unit) -> bool:
    """Whether an optimizer keeps fp32 copies of parameters of `unit`."""
    run = unit.state
    if run is None:
        return False
    tenants = [run.tenant_at(param.first) for param in unit.trainable]
    return any(tenant is not None and _MASTER in tenant.begun for tenant in tenants)


def refresh_masters(context: RuntimeContext, unit: Unit) -> None:
    """Have the fp32 copies of the unit's 16-bit parameters say what the parameters say.

    An update starts from the copy, so it would undo a change of the parameter alone. Where the
    copy still rounds to the parameter it keeps its bits.
    """
    unit.written = False
    if not has_masters(unit):
        return
    for param in unit.trainable:
        _refresh(context, unit, param)


def _refresh(context: RuntimeContext, unit: Unit, param: OffloadedParam) -> None:
    run = unit.state
    tenant = None if run is None else run.tenant_at(param.first)
    if run is None or tenant is None or _MASTER not in tenant.begun:
        return
    with context.held(unit):
        values = param.view(unit.param_slab).as_strided((param.numel,), (1,)).clone()
    master = run.read(tenant, _MASTER)
    changed = master.to(values.dtype).view(torch.int16) != values.view(torch.int16)
    if changed.any():
        master[changed] = values[changed].float()
        run.write(tenant, _MASTER, master)
