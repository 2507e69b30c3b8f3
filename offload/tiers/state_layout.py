"""StateLayout: which arrays an optimizer keeps for a parameter, and in what format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, get_args

import torch

from offload import _native

StateFormat = Literal["float32", "bfloat16", "int8"]
STATE_FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)

QUANT_BLOCK = 256
"""Elements of an int8 state that share one scale. Parameters start at multiples of it in a unit."""

MASTER = "master"
"""The name of the fp32 copy of a 16-bit parameter, in ``optimizer.state`` and in state_dicts."""

_PARAMS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PARAM_DTYPES = tuple(_PARAMS)
"""Of the parameters that the native rules update."""

_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}


@dataclass(frozen=True)
class StateArray:
    """One array that is kept for a parameter.

    Attributes:
        name: "master", or a state's name as in torch, with ".scale" for the scales of an int8 one.
        dtype: of its elements; codes of an int8 state are uint8.
        per: elements of the parameter that one of its elements is for.
    """

    name: str
    dtype: torch.dtype
    per: int = 1

    @property
    def in_memory(self) -> bool:
        """Whether it never lives on disk: scales are read and written by every chunk."""
        return self.per > 1

    def numel(self, numel: int) -> int:
        """Return how many elements belong to `numel` elements of the parameter."""
        return -(-numel // self.per)

    def nbytes(self, numel: int) -> int:
        """Return the bytes that belong to `numel` elements of the parameter."""
        return self.numel(numel) * self.dtype.itemsize


@dataclass(frozen=True)
class StateLayout:
    """What an optimizer keeps for each parameter of one dtype, under one group's options.

    Attributes:
        names: of the states, as in torch, in the order of the native rule.
        param: dtype of the parameter, one of PARAM_DTYPES.
        state: the format that states are kept in.
    """

    names: tuple[str, ...]
    param: torch.dtype
    state: StateFormat

    @cached_property
    def format(self) -> _native.UpdateFormat:
        """The layout as the native core takes it."""
        return _format(_PARAMS[self.param], self.state)

    @cached_property
    def master(self) -> StateArray | None:
        """The fp32 copy of the parameter; None for fp32 parameters."""
        return None if self.param is torch.float32 else StateArray(MASTER, torch.float32)

    @cached_property
    def states(self) -> tuple[StateArray, ...]:
        """One array per name."""
        return tuple(StateArray(name, _STORED[self.state]) for name in self.names)

    @cached_property
    def scales(self) -> tuple[StateArray, ...]:
        """One array per name where the states are int8, else none."""
        if self.state != "int8":
            return ()
        return tuple(scale_of(array) for array in self.states)

    @cached_property
    def arrays(self) -> tuple[StateArray, ...]:
        """All of them, scales first."""
        master = () if self.master is None else (self.master,)
        return (*self.scales, *master, *self.states)


def scale_of(state: StateArray) -> StateArray:
    """Return the array of the scales of an int8 state."""
    return StateArray(f"{state.name}.scale", torch.float32, QUANT_BLOCK)


@cache
def _format(param: str, state: str) -> _native.UpdateFormat:
    return _native.UpdateFormat(param=param, state=state)
