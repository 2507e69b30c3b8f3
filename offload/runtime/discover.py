"""Finding the units of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from offload.errors import PolicyError, UnsupportedError
from offload.planner import SMALL_BYTES
from offload.runtime.experts import expert_parameters
from offload.runtime.precision import Dtypes
from offload.tiers.compute_device import CPU


@dataclass
class FoundUnit:
    """A module and parameters that are fetched when it runs.

    Attributes:
        own: parameters that belong to this unit, all of one dtype, now and once they are kept,
            and all trained or all frozen, with their qualified names.
        nested: the module contains other units.
    """

    name: str
    module: nn.Module
    own: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    nested: bool = False


@dataclass
class Discovery:
    """The units of a model, and which modules use parameters of other units (tied weights).

    Attributes:
        shared: for each module that uses them in its own forward, parameters owned elsewhere.
    """

    units: list[FoundUnit]
    shared: list[tuple[nn.Module, list[nn.Parameter]]]


def find_units(
    model: nn.Module,
    names: Sequence[str] | None,
    limit: int,
    dtypes: Dtypes,
    devices: Sequence[torch.device] = (CPU,),
) -> Discovery:
    """Return the units of `model`, whose parameters will be kept in `dtypes`, used on `devices`.

    With `names`, these modules are units, whole. Otherwise the children of every ModuleList and
    Sequential are, split into their own children while they hold more than `limit` bytes or
    contain experts: modules alike in a ModuleList or ModuleDict, of which a forward may use some
    only, so that each is a unit, or rows of parameters, whose module is a unit then
    (experts.py). What remains becomes units of its own: each module that owns
    parameters directly. Where a module's parameters are of several dtypes, or some are frozen,
    those of each kind are a unit.

    Raises:
        PolicyError: a name is not a module, or one named module contains another.
        UnsupportedError: a parameter that cannot be moved (subclass, on another device, sparse).
    """
    modules = dict(model.named_modules())
    roots = _named(modules, names) if names is not None else _blocks(model, limit, dtypes)
    for name, param in model.named_parameters():
        _check(name, param, devices)
    _check_apart(model)
    owner: dict[nn.Parameter, FoundUnit] = {}
    units: list[FoundUnit] = []
    inside: set[nn.Module] = set()
    for name in roots:
        unit = FoundUnit(name, modules[name])
        for path, module in unit.module.named_modules(prefix=name):
            inside.add(module)
            _claim(unit, path, module, owner)
        units.append(unit)
    for name, module in modules.items():
        if module in inside:
            continue
        unit = FoundUnit(name or "(root)", module)
        unit.nested = _contains_units(module, dtypes)
        _claim(unit, name, module, owner)
        units.append(unit)
    units = [unit for unit in units if unit.own]
    order = {module: i for i, module in enumerate(model.modules())}
    units.sort(key=lambda unit: order[unit.module])
    shared = []
    within = {unit.name: set(unit.module.modules()) for unit in units}
    for module in model.modules():
        foreign = [
            p for p in module.parameters(recurse=False) if module not in within[owner[p].name]
        ]
        if foreign:
            shared.append((module, foreign))
    return Discovery([part for unit in units for part in _by_kind(unit, dtypes)], shared)


def _contains_units(module: nn.Module, dtypes: Dtypes) -> bool:
    """Whether units come and go while `module` runs, as far as one can tell."""
    children = list(module.children())
    if expert_parameters(module, dtypes):  # an activation function is a child, say
        return any(True for child in children for _ in child.parameters())
    return bool(children)


def _by_kind(unit: FoundUnit, dtypes: Dtypes) -> list[FoundUnit]:
    """Split `unit` into units of one kind each.

    An optimizer updates a unit in one format, and what is written with a trained parameter is
    written again in every step.
    """
    own: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, param in unit.own:
        dtype = " in ".join(dict.fromkeys([_short(param.dtype), _short(dtypes[param])]))
        own.setdefault((dtype, param.requires_grad), []).append((name, param))
    if len(own) == 1:
        return [unit]
    several = len({dtype for dtype, _ in own}) > 1
    parts = []
    for (dtype, trained), params in own.items():
        kind = [dtype] if several else []
        kind += [] if trained else ["frozen"]
        name = f"{unit.name} ({', '.join(kind)})" if kind else unit.name
        parts.append(FoundUnit(name, unit.module, params, unit.nested))
    return parts


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _claim(
    unit: FoundUnit, path: str, module: nn.Module, owner: dict[nn.Parameter, FoundUnit]
) -> None:
    for key, param in module.named_parameters(recurse=False):
        if param not in owner:
            owner[param] = unit
            unit.own.append((f"{path}.{key}" if path else key, param))


def _named(modules: dict[str, nn.Module], names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in modules:
            raise PolicyError(f"Policy(units=...): the model has no module {name!r}")
        for other in names:
            if other != name and (name == "" or other.startswith(name + ".")):
                raise PolicyError(f"Policy(units=...): {name!r} contains {other!r}")
    return list(names)


def _blocks(model: nn.Module, limit: int, dtypes: Dtypes) -> list[str]:
    """Names of the children of outermost ModuleLists and Sequentials, split at `limit` bytes."""
    found: list[str] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            if child in seen:  # a module that is used in several places has one name
                continue
            seen.add(child)
            path = f"{name}.{child_name}" if name else child_name
            if expert_parameters(child, dtypes):
                found.append(path)
            elif isinstance(module, nn.ModuleList | nn.Sequential):
                split(path, child)
            else:
                visit(path, child)

    def split(path: str, module: nn.Module) -> None:
        if expert_parameters(module, dtypes):
            found.append(path)
            return
        children = [
            (f"{path}.{name}", child)
            for name, child in module.named_children()
            if child not in seen and any(True for _ in child.parameters())
        ]
        seen.update(child for _, child in children)
        has_experts = any(_is_experts(inner, dtypes) for inner in module.modules())
        is_whole = _nbytes(module, dtypes) <= limit and not has_experts
        if is_whole or not children:
            found.append(path)
            return
        for child_path, child in children:
            split(child_path, child)

    visit("", model)
    return found


def _is_experts(module: nn.Module, dtypes: Dtypes) -> bool:
    """Whether `module` has experts that are large enough to be moved one by one.

    They are rows of its parameters, or its children, which are alike.
    """
    if expert_parameters(module, dtypes):
        return True
    children = list(module.children())
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(children) < 2:
        return False
    if min(_nbytes(child, dtypes) for child in children) <= SMALL_BYTES:
        return False
    return len({(type(child), _shapes(child)) for child in children}) == 1


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, param.shape) for name, param in module.named_parameters())


def _nbytes(module: nn.Module, dtypes: Dtypes) -> int:
    return sum(p.numel() * dtypes[p].itemsize for p in module.parameters())


def _check(name: str, param: nn.Parameter, devices: Sequence[torch.device]) -> None:
    if type(param) is not nn.Parameter:
        raise UnsupportedError(
            f"{name} is a {type(param).__name__}; only plain torch.nn.Parameter can be offloaded"
        )
    if param.device not in (CPU, *devices) or param.layout is not torch.strided:
        where = " or ".join(["the CPU", *(str(d) for d in devices if d != CPU)])
        raise UnsupportedError(
            f"{name} is a {param.layout} tensor on {param.device}; expected a dense one on {where}"
        )


def _check_apart(model: nn.Module) -> None:
    """Refuse a parameter that shares memory with another or with a buffer: it would stop doing so.

    Several names of one parameter are no such case.
    """
    ranges: dict[int, list[tuple[int, int, str, bool]]] = {}
    for is_param, tensors in ((True, model.named_parameters()), (False, model.named_buffers())):
        for name, tensor in tensors:
            if tensor.device.type not in ("cpu", "cuda") or tensor.layout is not torch.strided:
                continue
            if tensor.numel() == 0:
                continue
            last = sum((n - 1) * k for n, k in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.data_ptr()
            end = first + (last + 1) * tensor.dtype.itemsize
            storage = tensor.untyped_storage().data_ptr()
            ranges.setdefault(storage, []).append((first, end, name, is_param))
    for sharing in ranges.values():
        sharing.sort(key=lambda item: item[:2])
        for (_, end, name, is_param), (first, _, other, other_is_param) in pairwise(sharing):
            if first < end and (is_param or other_is_param):
                raise UnsupportedError(
                    f"{name} and {other} are different tensors in the same memory, which they "
                    "could not share on disk; make them one nn.Parameter, or copies"
                )
