"""Which modules and units of a model are on which device.

The forward of one block is code that mixes tensors freely, as in ``x + self.mlp(x)``, so it must be
on one device. What is kept together is a part:
 1. each child of an outermost ModuleList or Sequential, and each module that is one unit.
 2. elsewhere, each module in which there is no such list; never the whole model.
Modules around parts (the model itself, an encoder) are outer ones: their forward goes from device
to device. Parameters of their own are used where the other operands are (touch.py). On one device
are also
 3. the parts whose modules share weights: a module uses weights of one device.
 4. in an outer module, the parts before its first list: embeddings are often added up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from offload.planner import device_runs
from offload.runtime.discover import Discovery
from offload.runtime.precision import Dtypes

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class DeviceShares:
    """The devices of one model, by number.

    Attributes:
        units: of each unit.
        modules: of each module in a part that has weights, or buffers; others compute where their
            inputs are.
        parts: their outermost modules, and those of parts that have neither.
        following: of a child of a list, the device of the next one.
        spread: indices of the units that outer modules use, where there are several devices.
    """

    units: tuple[int, ...]
    modules: dict[nn.Module, int] = field(default_factory=dict)
    parts: tuple[nn.Module, ...] = ()
    following: dict[nn.Module, int] = field(default_factory=dict)
    spread: frozenset[int] = frozenset()

    @property
    def count(self) -> int:
        """How many devices have something."""
        return 1 + max(self.units, default=0)


def share_out(model: nn.Module, found: Discovery, dtypes: Dtypes, devices: int) -> DeviceShares:
    """Return what of `model`, whose parameters will be kept in `dtypes`, each device has.

    In the order of the modules, about as many bytes of parameters and gradients each.
    """
    if devices == 1:
        return DeviceShares((0,) * len(found.units))
    whole = {unit.module for unit in found.units if not unit.nested}
    parts = list(_parts(model, whole))
    part_of: dict[nn.Module, nn.Module] = {}
    for part in parts:
        for module in part.modules():
            part_of.setdefault(module, part)
    groups = _groups(model, found, part_of)
    nbytes = [
        sum(p.numel() * dtypes[p].itemsize * (1 + p.requires_grad) for _, p in unit.own)
        for unit in found.units
    ]
    units = device_runs(nbytes, groups, devices)
    of_param = {
        p: device for unit, device in zip(found.units, units, strict=True) for _, p in unit.own
    }
    of_part: dict[nn.Module, int] = {}
    for part in parts:
        device = next((of_param[p] for p in part.parameters()), None)
        if device is not None:
            of_part[part] = device
    following = {}
    for siblings in _lists(model, part_of):
        last = 0
        for part in siblings:
            last = of_part.get(part, last)
            if any(True for _ in part.buffers()):
                of_part.setdefault(part, last)
        for part, after in pairwise(siblings):
            if after in of_part:
                following[part] = of_part[after]
    for part in parts:
        if any(True for _ in part.buffers()):
            of_part.setdefault(part, 0)
    by_outer = {p for module, params in found.shared if module not in part_of for p in params}
    return DeviceShares(
        units,
        {m: of_part[part] for m, part in part_of.items() if part in of_part},
        tuple(parts),
        following,
        frozenset(
            i
            for i, unit in enumerate(found.units)
            if unit.module not in part_of or any(p in by_outer for _, p in unit.own)
        ),
    )


def _parts(module: nn.Module, whole: set[nn.Module], outermost: bool = True) -> Iterator[nn.Module]:
    """The outermost modules of the parts of `module`, in order; one may come twice."""
    children = list(module.children())
    if module in whole or not children:
        yield module
        return
    if not outermost and not any(isinstance(inner, _LISTS) for inner in module.modules()):
        yield module
        return
    for child in children:
        if isinstance(module, _LISTS):
            yield child
        else:
            yield from _parts(child, whole, outermost=False)


def _lists(model: nn.Module, part_of: dict[nn.Module, nn.Module]) -> Iterator[list[nn.Module]]:
    """The children of each outermost list."""
    for module in model.modules():
        if isinstance(module, _LISTS) and module not in part_of:
            yield [child for child in module.children() if part_of[child] is child]


def _groups(
    model: nn.Module, found: Discovery, part_of: dict[nn.Module, nn.Module]
) -> list[Hashable]:
    """Return, for each unit, what stands for the units that must be on one device."""
    keys = [part_of.get(unit.module, unit.module) for unit in found.units]
    head = {key: key for key in keys}

    def find(key: nn.Module) -> nn.Module:
        while head[key] is not key:
            key = head[key]
        return key

    of_param = {p: key for unit, key in zip(found.units, keys, strict=True) for _, p in unit.own}
    sharing = {part_of[module] for module, _ in found.shared if module in part_of}
    together = [[part] for part in sharing] + list(_first_parts(model, part_of))
    for parts in together:
        owners = [of_param[p] for part in parts for p in part.parameters()]
        for other in owners[1:]:
            head[find(other)] = find(owners[0])
    return [find(key) for key in keys]


def _first_parts(
    model: nn.Module, part_of: dict[nn.Module, nn.Module]
) -> Iterator[list[nn.Module]]:
    """The parts of each outer module that come before the outer module or list within it."""
    for module in model.modules():
        if module in part_of or isinstance(module, _LISTS):
            continue
        children = list(module.children())
        outer = [child not in part_of for child in children]
        if any(outer):
            yield children[: outer.index(True)]
