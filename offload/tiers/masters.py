"""Masters: the fp32 values of parameters that are kept and computed with in 16 bits.

A narrowed parameter is its master rounded to nearest, at every moment:
 1. seed: before the parameter is rounded in ``wrap``, its values become the master.
 2. of a trained parameter the master is the array of that name in the unit's state, from which
    every update starts and to which it writes. It belongs to the model and not to an optimizer.
 3. of a frozen one it is a slab that no step uses; on disk, unless everything fits into memory.
 4. what is written to the parameter alone (in place, within ``materialize``) becomes the master's
    value where that does not round to it (changed_values.py).
 5. ``state_dict`` and ``unwrap`` read the masters, ``load_state_dict`` and ``load_weights`` write
    them, and round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from offload.tiers.state_home import StateHome
from offload.tiers.state_layout import MASTER, StateArray
from offload.tiers.state_slabs import Tenant
from offload.tiers.unit import OffloadedParam, Unit

if TYPE_CHECKING:
    from offload.tiers.context import RuntimeContext

MASTER_ARRAY = StateArray(MASTER, torch.float32)


def provide_masters(context: RuntimeContext, units: Sequence[Unit]) -> None:
    """Make the slabs for the masters of all of `units`, where the plan wants them.

    Raises:
        BudgetError, SwapSpaceError: there is no room.
    """
    for unit in units:
        if not unit.is_narrowed:
            continue
        on_disk = not context.plan.placements[unit.index].pin_state
        home = StateHome.of_context(context)
        if unit.grad_bytes:
            run = context.state_of(unit)
            name, nbytes = f"{MASTER} of {unit.name}", MASTER_ARRAY.nbytes(run.numel)
            run.add(MASTER_ARRAY, home.make_slab(name, nbytes, MASTER, on_disk))
        for param in unit.params:
            if not param.trainable and param.numel:
                name, nbytes = f"{MASTER} of {param.name}", MASTER_ARRAY.nbytes(param.numel)
                unit.frozen_masters[param] = home.make_slab(name, nbytes, MASTER, on_disk)


def seed_masters(context: RuntimeContext, unit: Unit) -> None:
    """Have the masters hold the parameters' values, which are still fp32, and start writing."""
    if not unit.is_narrowed:
        return
    for param in unit.params:
        write_master(context, param, partial(copy_values, param.param.detach()))
    if unit.grad_bytes:
        context.state_of(unit).write_back(MASTER_ARRAY)


def write_master(
    context: RuntimeContext, param: OffloadedParam, fill: Callable[[torch.Tensor], object]
) -> None:
    """Replace the master of `param`: `fill` gets its memory, of the parameter's shape.

    The parameter is to be rounded from it at once. For a frozen one, memory is taken of the ring
    beside what is held there. If `fill` raises, what it left is the master.
    """
    if not param.numel:
        return
    mover = context.mover
    if param.trainable:
        run = context.state_of(param.unit)
        fill(_shaped(param, run.to_write(_part_of(param), MASTER_ARRAY)))
        return
    slab = param.unit.frozen_masters[param]
    mover.hold_new(slab)
    fill(slab.view(0, param.shape, param.stride, torch.float32))
    mover.write_back(slab)


def replace_master(
    context: RuntimeContext, param: OffloadedParam, fill: Callable[[torch.Tensor], object]
) -> None:
    """Do write_master(), from outside: whether or not the parameter comes to be rounded from it.

    A pending update is finished first, so that it does not run over it.
    """
    context.settle(param.unit)
    param.unit.written = True
    write_master(context, param, fill)


def read_master(context: RuntimeContext, param: OffloadedParam) -> torch.Tensor:
    """Return a copy of the master, of the parameter's shape and strides, outside of the budget."""
    if not param.numel:
        return torch.empty_strided(param.shape, param.stride)
    if param.trainable:
        run = context.state_of(param.unit)
        return _shaped(param, run.read(_part_of(param), MASTER_ARRAY))
    slab = param.unit.frozen_masters[param]
    flat = StateHome.of_context(context).copy_out(slab).view(torch.float32)
    return _shaped(param, flat)


def copy_values(source: torch.Tensor, target: torch.Tensor) -> None:
    """Fill `target` with the values of `source`."""
    target.copy_(source)


def _part_of(param: OffloadedParam) -> Tenant:
    """Return the place of `param` in its unit's state, whoever the tenant is."""
    return Tenant(param.name, param.first, param.numel)


def _shaped(param: OffloadedParam, flat: torch.Tensor) -> torch.Tensor:
    return flat.as_strided(param.shape, param.stride)
