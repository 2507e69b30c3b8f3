"""load_weights(): a checkpoint's tensors go straight to where a model's parameters live.

1. The files' headers and the model's names, shapes and dtypes are compared; nothing is changed yet.
2. Unit by unit, the parameters are held in memory and read into, one tensor at a time. Of
   narrowed ones the masters are read before, and then the same bytes again, rounded from fp32.
   With ``frozen="file"``, spilled frozen units that lie in files as they are stay there.
3. What is no unit's follows: buffers, and parameters in ordinary memory or scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from offload.checkpoint.safetensors_file import StoredTensor, stored_tensors
from offload.errors import CheckpointError, PolicyError
from offload.runtime.materialize import UnitsHeld
from offload.runtime.scratch_memory import region_of
from offload.tiers.masters import replace_master
from offload.tiers.unit import Unit, owner_of
from offload.tiers.weight_files import can_stay, move_to_file, note_origin

FROZEN = ("copy", "file")
"""What becomes of frozen weights: copied to where others live, or left in their files."""

_NAMED = 20
"""Names that a message lists of each kind."""


class IncompatibleKeys(NamedTuple):
    """Names that only one side has, as ``load_state_dict`` returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(
    model: nn.Module, path: Path, strict: bool, frozen: str = "copy"
) -> IncompatibleKeys:
    """See offload.load_weights."""
    if frozen not in FROZEN:
        raise PolicyError(f"load_weights(frozen={frozen!r}): expected one of {', '.join(FROZEN)}")
    stays = frozen == "file"
    stored = stored_tensors(path)
    names = dict(_names(model))
    chosen: dict[torch.Tensor, tuple[str, StoredTensor]] = {}
    for name, tensor in names.items():
        if tensor is not None and name in stored:
            chosen[tensor] = name, stored[name]  # of several names the last counts, as in torch
    missing = [n for n, tensor in names.items() if tensor is None or tensor not in chosen]
    unexpected = [name for name in stored if name not in names]
    _check(model, path, chosen, missing if strict else [], unexpected if strict else [])

    units: dict[Unit, list[torch.Tensor]] = {}
    rest = []
    for tensor in chosen:
        owner = owner_of(tensor)
        if owner is None:
            rest.append(tensor)
        else:
            units.setdefault(owner.unit, []).append(tensor)
    with torch.no_grad():
        for unit, tensors in units.items():
            if stays and _stays_in_file(unit, chosen):
                continue
            if unit.is_narrowed:
                for tensor in tensors:
                    _read_master(chosen[tensor][1], tensor)
            with UnitsHeld(unit.name, [unit]):
                for tensor in tensors:
                    _read(chosen[tensor][1], tensor, torch.float32 if unit.is_narrowed else None)
        for tensor in rest:
            region = region_of(tensor)
            if region is not None:
                region.memory.use([region])
            _read(chosen[tensor][1], tensor)
            if isinstance(tensor, nn.Parameter):
                note_origin(tensor, chosen[tensor][1].origin() if stays else None)
    return IncompatibleKeys(missing, unexpected)


def _names(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the names that ``model.state_dict()`` has; None: what it is cannot be in a file."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, param in module._parameters.items():
            if param is not None:
                yield prefix + name, param
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}_extra_state", None


def _stays_in_file(unit: Unit, chosen: dict[torch.Tensor, tuple[str, StoredTensor]]) -> bool:
    """Have the files be the home of `unit`, where they have all of it as it is kept."""
    if unit.param_slab.pinned:
        return False
    origins = {}
    for param in unit.params:
        stored = chosen.get(param.param)
        origin = None if stored is None else stored[1].origin()
        if origin is None or not can_stay(param, origin):
            return False
        origins[param] = origin
    context = unit.params[0].context
    with context.lock:
        return move_to_file(context, unit, origins)


def _read_master(stored: StoredTensor, tensor: torch.Tensor) -> None:
    owner = owner_of(tensor)
    if owner is not None:
        with owner.context.lock:
            replace_master(owner.context, owner, stored.read_into)


def _read(stored: StoredTensor, tensor: torch.Tensor, through: torch.dtype | None = None) -> None:
    stored.read_into(tensor.detach(), through)
    torch.autograd.graph.increment_version(tensor)


def _check(
    model: nn.Module,
    path: Path,
    chosen: dict[torch.Tensor, tuple[str, StoredTensor]],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> None:
    """Raise CheckpointError naming all that does not fit."""
    shapes, dtypes = [], []
    for tensor, (name, stored) in chosen.items():
        wanted = tuple(tensor.shape)
        if stored.shape != wanted and (wanted, stored.shape) != ((), (1,)):
            shapes.append(f"{name} is {list(stored.shape)}, expected {list(wanted)}")
        if stored.dtype is None or (stored.dtype.is_complex and not tensor.dtype.is_complex):
            dtypes.append(f"{name} is {stored.kind}, expected {tensor.dtype}")
    lines = [
        f"  {what}: {', '.join(found[:_NAMED])}"
        + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("other shapes", shapes),
            ("dtypes that cannot be converted", dtypes),
        )
        if found
    ]
    if lines:
        hint = "; strict=False allows missing and unexpected names" if missing or unexpected else ""
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}; nothing was changed{hint}:\n"
            + "\n".join(lines)
        )
