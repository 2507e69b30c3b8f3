"""Placement: which slabs stay in host memory.

A byte of parameters on disk is read twice per micro-batch (forward, backward); a byte of gradients
is read and written once, in the backward alone; a byte of optimizer state is read and written once
per step. So the state leaves memory first. Of parameters and gradients, both are spilled in a
proportion that loads the disk evenly: the backward takes about twice as long as the forward, and
only spilled parameters give the disk something to do during the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload.errors import BudgetError
from offload.planner.spec import DiskSpec, Placement, Plan, UnitSpec

SMALL_BYTES = 64 << 10
"""Units up to this size (norms, biases) are never spilled: a transfer of them costs a request and
saves next to nothing."""

LEAST_STAGING_BLOCKS = 12
"""The widest chunk of an update, of any rule and format, takes as many
(``UpdatePipeline.min_staging_bytes``)."""
_MOST_STAGING_BLOCKS = 32


def smallest_budget(
    units: Sequence[UnitSpec], disk: DiskSpec | None, device_updates: bool = False
) -> int:
    """Return the least host budget in bytes with which `units` can be trained.

    Args:
        units: all units of the model.
        disk: what to spill to; None: nothing may be spilled.
        device_updates: updates run on a device, and their states pass through the ring.
    """
    everything = _everything(units)
    if disk is None:
        return everything
    staging = LEAST_STAGING_BLOCKS * disk.block_bytes + disk.store_bytes
    scales = sum(u.scale_bytes for u in units)
    ring = _least_ring(units, device_updates)
    return min(everything, _kept_bytes(units) + scales + staging + ring)


def place(
    units: Sequence[UnitSpec],
    budget_bytes: int,
    disk: DiskSpec | None,
    activation_bytes: int = 0,
    device_updates: bool = False,
) -> Plan:
    """Return the plan for `units` within `budget_bytes` of host memory, spilling to `disk`.

    Args:
        units: all units of the model.
        budget_bytes: of host memory, for everything.
        disk: what to spill to; None: nothing may be spilled.
        activation_bytes: the part of the budget that is for activations.
        device_updates: as for smallest_budget().

    Raises:
        BudgetError: the budget is too small; the message names the smallest that would do.
    """
    least = smallest_budget(units, disk, device_updates) + activation_bytes
    if budget_bytes < least:
        hint = "" if disk is not None else " without a swap directory (Policy(swap_dir=...))"
        raise BudgetError(
            f"Budget(host={budget_bytes}) is too small for this model{hint}: the smallest host "
            f"budget that would do is {least} bytes ({least / 2**20:.1f} MiB)"
            + (f", {activation_bytes} of them for activations" if activation_bytes else "")
        )
    values_bytes = budget_bytes - activation_bytes
    if disk is None or values_bytes >= _everything(units):
        pinned = tuple(Placement(u, True, True, True) for u in units)
        return Plan(budget_bytes, 0, 0, 0, pinned, activation_bytes=activation_bytes)

    block_bytes = disk.block_bytes
    staging_blocks = min(
        _MOST_STAGING_BLOCKS, max(LEAST_STAGING_BLOCKS, values_bytes // 32 // block_bytes)
    )
    flat = [u for u in units if not _is_kept(u)]
    values = sum(u.param_bytes + u.grad_bytes for u in flat)
    scales = sum(u.scale_bytes for u in units)
    room = values_bytes - disk.store_bytes - _kept_bytes(units) - scales
    left = room - staging_blocks * block_bytes
    least_ring = _least_ring(units, device_updates)
    if left < least_ring:
        staging_blocks = LEAST_STAGING_BLOCKS
        left = room - staging_blocks * block_bytes
    largest = max(*_largest(flat), _largest_state(flat), _largest_frozen_master(units))
    if device_updates:
        largest = max(largest, least_ring)
    if left >= values + largest:  # the ring serves to read optimizer state out
        ring, pins = largest, {(i, kind) for i in range(len(units)) for kind in ("param", "grad")}
        left -= values + largest
    else:
        ring = max(least_ring, min(_good_ring(units), left // 2))
        pins, left = _pin_values(units, left - ring, disk.write_time)
        ring += left
        left = 0
    placements = []
    for i, unit in enumerate(units):
        kept = _is_kept(unit)
        may_pin = not unit.frozen_masters and 0 < unit.state_bytes <= left
        pin_state = _keeps_state(unit) or may_pin
        left -= unit.state_bytes if pin_state and not kept else 0
        placements.append(
            Placement(
                unit,
                pin_params=kept or (i, "param") in pins,
                pin_grads=kept or (i, "grad") in pins or unit.grad_bytes == 0,
                pin_state=pin_state or unit.state_bytes == 0,
            )
        )
    return Plan(
        budget_bytes,
        staging_blocks * block_bytes,
        disk.store_bytes,
        ring + left,
        tuple(placements),
        scales,
        activation_bytes,
    )


def _everything(units: Sequence[UnitSpec]) -> int:
    return sum(u.param_bytes + u.grad_bytes + u.state_bytes for u in units)


def _is_kept(unit: UnitSpec) -> bool:
    return unit.nested or unit.param_bytes <= SMALL_BYTES


def _kept_bytes(units: Sequence[UnitSpec]) -> int:
    """Host memory of units that are never spilled, their optimizer state included."""
    values = sum(u.param_bytes + u.grad_bytes for u in units if _is_kept(u))
    return values + sum(u.state_bytes for u in units if _keeps_state(u))


def _keeps_state(unit: UnitSpec) -> bool:
    """Whether its state never leaves memory; what is kept of large frozen ones is not in use."""
    if unit.frozen_masters:
        return unit.param_bytes <= SMALL_BYTES
    return _is_kept(unit)


def _largest(units: Sequence[UnitSpec]) -> tuple[int, int]:
    params = max((u.param_bytes for u in units), default=0)
    return params, max((u.grad_bytes for u in units), default=0)


def _largest_state(units: Sequence[UnitSpec]) -> int:
    return max((u.state_slab_bytes for u in units), default=0)


def _largest_frozen_master(units: Sequence[UnitSpec]) -> int:
    """Of those that pass through the ring: written in ``wrap``, before the parameter comes."""
    spilled = [u for u in units if not _keeps_state(u)]
    return max((nbytes for u in spilled for nbytes in u.frozen_masters), default=0)


def _least_ring(units: Sequence[UnitSpec], device_updates: bool = False) -> int:
    """Bytes in which the largest unit can be used wherever another slab lies.

    At the most one other slab is held while one is placed; around it, one of two gaps has half of
    what is left. Hence both slabs of the largest unit, and the larger of them once more. Of 16-bit
    parameters a slab of state is larger, and the first one is made while the parameters are held.
    With updates on a device the states come, one by one, while both may be held, and a frozen unit.
    """
    flat = [u for u in units if not _is_kept(u)]
    params, grads = _largest(flat)
    used = max(params + grads + max(params, grads), params + 2 * _largest_state(flat))
    if device_updates:
        frozen = any(u.grad_bytes == 0 for u in flat)
        slabs = 5 if frozen else 3
        used = max(used, params + grads + slabs * max(params, grads, _largest_state(flat)))
    return max(used, _largest_frozen_master(units))


def _good_ring(units: Sequence[UnitSpec]) -> int:
    """Bytes that let the next unit arrive and the previous one leave while one is used."""
    params, grads = _largest([u for u in units if not _is_kept(u)])
    return max(2 * params + 3 * grads, _least_ring(units))


def _pin_values(
    units: Sequence[UnitSpec], room: int, write_time: float
) -> tuple[set[tuple[int, str]], int]:
    """Choose parameter and gradient slabs to pin in `room` bytes, spread evenly over the units.

    Returns the choice and the bytes left over.
    """
    flat = [(i, u) for i, u in enumerate(units) if not _is_kept(u)]
    params = sum(u.param_bytes for _, u in flat)
    grads = sum(u.grad_bytes for _, u in flat)
    streamed = params + grads - room
    # Forward: X of reads. Backward: X + Y of reads and Y of writes, in twice the time. Equal load
    # for X + Y = `streamed`:
    share = 0.5 * (1 + write_time) / (1 + 0.5 * write_time)
    stream_params = min(float(params), max(share * streamed, float(streamed - grads)))
    pin_share = {
        "param": 1 - stream_params / params if params else 0.0,
        "grad": 1 - (streamed - stream_params) / grads if grads else 0.0,
    }
    pins: set[tuple[int, str]] = set()
    # Half a unit apart, so that a unit with spilled parameters tends to keep its gradients.
    credit = {"param": 0.0, "grad": 0.5}
    for i, unit in flat:
        for kind, size in (("param", unit.param_bytes), ("grad", unit.grad_bytes)):
            credit[kind] += pin_share[kind]
            if size and credit[kind] >= 1 - 1e-9 and size <= room:
                credit[kind] -= 1
                pins.add((i, kind))
                room -= size
    for i, unit in flat:
        for kind, size in (("param", unit.param_bytes), ("grad", unit.grad_bytes)):
            if size and (i, kind) not in pins and size <= room:
                pins.add((i, kind))
                room -= size
    return pins, room
