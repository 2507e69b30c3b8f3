"""Where tensors are, for several simulated devices: torch takes them all for the CPU.

While a Locations is active, each operator's operands must be on one device, as CUDA demands, and
its results are there. What lies in a device's memory is known by its address; what a move returns
is where it was moved to; anything else is on the host, and may be used anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from offload.runtime import wrapped as wrapped_module
from offload.runtime.device_moves import DeviceMoves
from offload.runtime.wrapped import wrapped
from offload.tiers import places
from offload.tiers.grad_handle import GradHandle
from offload.tiers.spent_grad import SpentGrad

HOST = "host"
Location = int | str


class MixedDevicesError(AssertionError):
    """An operator was given tensors of two devices."""


class Locations(TorchDispatchMode):
    """Notes where tensors are. `moves` counts those from one place to another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.moves: dict[tuple[Location, Location], int] = {}
        self._known: dict[int, tuple[StorageWeakRef, Location]] = {}
        self._ranges = []
        for number, tier in enumerate(wrapped(model).context.tiers):
            for arena in (tier.room.home, tier.room.ring):
                if arena is not None:
                    lease = arena.allocate(512)  # anywhere: all of it is one allocation
                    begin = lease.address - lease.offset
                    self._ranges.append((begin, begin + arena.usage()["budget"], number))

    def of(self, tensor: torch.Tensor) -> Location:
        storage = torch.Tensor.untyped_storage(tensor)
        for begin, end, number in self._ranges:
            if begin <= storage.data_ptr() < end:
                return number
        known = self._known.get(storage._cdata)
        return HOST if known is None or known[0].expired() else known[1]

    def note(self, tensor: torch.Tensor, location: Location) -> None:
        storage = torch.Tensor.untyped_storage(tensor)
        self._known[storage._cdata] = (StorageWeakRef(storage), location)

    def move(self, tensor: torch.Tensor, location: Location) -> torch.Tensor:
        before = self.of(tensor)
        if before == location:
            return tensor
        self.moves[before, location] = self.moves.get((before, location), 0) + 1
        moved: torch.Tensor = _Move.apply(tensor, self, before, location)  # type: ignore[no-untyped-call]
        return moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [v for v in tree_iter((args, kwargs or {})) if isinstance(v, torch.Tensor)]
        found = {self.of(v) for v in operands if _has_memory(v)} - {HOST}
        if len(found) > 1:
            raise MixedDevicesError(f"{func} on tensors of devices {sorted(map(str, found))}")
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            is_new = isinstance(value, torch.Tensor) and _has_memory(value)
            if found and is_new and self.of(value) == HOST:
                self.note(value, next(iter(found)))
        return result


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, locations: Locations, before: Location, after: Location
    ) -> torch.Tensor:
        ctx.way = locations, before
        copy = tensor.clone()
        locations.note(copy, after)
        return copy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        locations, before = ctx.way
        copy = grads[0].clone()
        locations.note(copy, before)
        return copy, None, None, None


def _has_memory(tensor: torch.Tensor) -> bool:
    is_handle = isinstance(tensor, GradHandle | SpentGrad)
    return tensor.layout is torch.strided and not tensor.is_meta and not is_handle


@contextmanager
def located(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have models that are wrapped within the block move tensors as on CUDA devices."""

    class ByNumber(DeviceMoves):
        def __init__(self, model: Any, shares: Any, devices: Any, hooked: Any) -> None:
            super().__init__(model, shares, tuple(range(len(devices))), hooked)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(wrapped_module, "DeviceMoves", ByNumber)
        yield


@contextmanager
def tracked(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Locations]:
    """Have the operators on a model that was wrapped within located() checked."""
    locations = Locations(model)
    with monkeypatch.context() as patch, locations:
        patch.setattr(places, "place_of", locations.of)
        patch.setattr(places, "moved", locations.move)
        yield locations
