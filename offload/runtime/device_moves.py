"""DeviceMoves: tensors are brought to the device of the module that is given them.

For a model that several devices share. Protocol of a forward:
 1. before a module that has a device runs, tensors among its arguments that are elsewhere are moved
    there, also those in tuples, lists, dicts and what else torch's pytree takes apart of these
    kinds. Anything else, such as a cache of keys and values, is passed on as it is.
 2. a module without weights and buffers, between parts, computes where its first tensor is; the
    others are moved there.
 3. what a child of a list returns goes on to the device of the next one: a block that is
    checkpointed from outside gets inputs that are there, by which torch knows whose random state
    the recomputation needs.
 4. what the model returns is moved to where its first tensor argument was.
A move is a copy with a gradient: what is written to it in place is not seen in the original. What
several modules of a device are given in one forward (a mask, an encoder's output) is moved once:
that is cheaper, and gradients are added up in the order in which they are on one device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from offload.runtime.activations import in_backward
from offload.runtime.device_shares import DeviceShares
from offload.tiers import places
from offload.tiers.places import Place
from offload.tiers.uncompiled import uncompiled


class DeviceMoves:
    """The hooks of one model that move tensors. They run first of all."""

    def __init__(
        self,
        model: nn.Module,
        shares: DeviceShares,
        devices: tuple[Place, ...],
        hooked: Iterable[nn.Module],
    ) -> None:
        """Set them on the parts of `model`, and on modules in them that are `hooked` otherwise."""
        self.handles: list[RemovableHandle] = []
        self._passes: dict[int, ForwardPass] = {}  # by thread
        modules = dict.fromkeys((*shares.parts, *(m for m in hooked if m in shares.modules)))
        for module in modules:
            if module is not model:
                number = shares.modules.get(module)
                self._before(module, None if number is None else devices[number])
        for module, number in shares.following.items():
            self._after(module, devices[number])
        self._around(model, devices[0])

    def _before(self, module: nn.Module, place: Place | None) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            where = _first_place((args, kwargs)) if place is None else place
            return self._brought((args, kwargs), where)

        self._add(module, enter)

    def _after(self, module: nn.Module, place: Place) -> None:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            return self._brought(output, place)

        self.handles.append(module.register_forward_hook(uncompiled(leave)))

    def _around(self, model: nn.Module, place: Place) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            first = _first_place((args, kwargs))
            begun = self._passes[threading.get_ident()] = ForwardPass(
                place if first is None else first
            )
            return brought((args, kwargs), place, begun)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            ended = self._passes.pop(threading.get_ident(), None)
            return output if ended is None else brought(output, ended.first)

        self._add(model, enter)
        hook = model.register_forward_hook(uncompiled(leave), always_call=True)
        self.handles.append(hook)

    def _brought(self, values: Any, place: Place | None) -> Any:
        return brought(values, place, self._passes.get(threading.get_ident()))

    def _add(self, module: nn.Module, enter: Callable[..., Any]) -> None:
        hook = uncompiled(enter)
        self.handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))


_Copies = dict[tuple[Place, bool], tuple[torch.Tensor, tuple[int, int]]]
"""Of one tensor, by place and whether gradients flow back: the copy, both versions at the time."""


class ForwardPass:
    """One forward of the model.

    Attributes:
        first: where its first tensor argument was.
    """

    def __init__(self, first: Place) -> None:
        self.first = first
        self._copies: Any = WeakIdKeyDictionary()

    def moved(self, tensor: torch.Tensor, place: Place) -> torch.Tensor:
        """Return a copy of `tensor` at `place`, that of an earlier call if nothing has changed."""
        counts_no_versions = tensor.is_inference() or torch.is_inference_mode_enabled()
        if in_backward() or counts_no_versions:
            return places.moved(tensor, place)
        known: _Copies = self._copies.setdefault(tensor, {})
        key = place, torch.is_grad_enabled()
        if key not in known or known[key][1] != (tensor._version, known[key][0]._version):
            copy = places.moved(tensor, place)
            known[key] = copy, (tensor._version, copy._version)
        return known[key][0]


def brought(values: Any, place: Place | None, during: ForwardPass | None = None) -> Any:
    """Return `values` with its tensors at `place`; the same object if they are there already."""
    if place is None or all(
        places.place_of(value) == place
        for value in tree_iter(values, is_leaf=_is_whole)
        if isinstance(value, torch.Tensor)
    ):
        return values

    def move(value: torch.Tensor) -> torch.Tensor:
        if during is None or places.place_of(value) == place:
            return places.moved(value, place)
        return during.moved(value, place)

    return tree_map_only(torch.Tensor, move, values, is_leaf=_is_whole)


def _first_place(values: Any) -> Place | None:
    for value in tree_iter(values, is_leaf=_is_whole):
        if isinstance(value, torch.Tensor):
            return places.place_of(value)
    return None


def _is_whole(value: Any) -> bool:
    """Whether `value` is no container that may be replaced by one with other tensors."""
    return not (isinstance(value, tuple | list | dict) or is_dataclass(value))
