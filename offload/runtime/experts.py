"""Experts in one parameter: which modules have them, and which of them a call is routed to.

Protocol of a use of some experts only:
 1. the module's call says which in an argument. Before it runs, their rows of the parameters are
    fetched (Mover: a PARTIAL slab), and the parameters' class is RowsParameter: whoever else uses
    them meanwhile has the rest fetched first.
 2. while it runs, its RowGuard looks at each operator that is given memory of the parameters. Rows
    that it reads and the call did not name are fetched before it runs.
 3. what autograd saves of the parameters refers to the rows of this call, and the backward fetches
    these again.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from offload.planner import SMALL_BYTES
from offload.runtime.precision import Dtypes

_INDEX = "top_k_index"
"""The argument of a module's forward, integers of any shape: the experts that its tokens go to."""


def expert_parameters(module: nn.Module, dtypes: Dtypes) -> set[nn.Parameter]:
    """Return the parameters of `module`, kept in `dtypes`, that have a row for each of its experts.

    None where its forward is not told which experts to use, or an expert is too small to be moved
    by itself.
    """
    count = getattr(module, "num_experts", None)
    if type(count) is not int or count < 2 or not is_routed(module):
        return set()
    found = {
        param
        for param in module.parameters(recurse=False)
        if param.dim() >= 2 and param.shape[0] == count
    }
    nbytes = sum(param.numel() * dtypes[param].itemsize for param in found) // count
    return found if nbytes > SMALL_BYTES else set()


def is_routed(module: nn.Module) -> bool:
    """Whether the forward of `module` is told which experts to use."""
    return _INDEX in inspect.signature(module.forward).parameters


class Routing:
    """Reads from the arguments of a module's calls which experts they use."""

    def __init__(self, module: nn.Module, count: int) -> None:
        """`module` has `count` experts, and its forward is told which to use."""
        self._signature = inspect.signature(module.forward)
        self._count = count

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int] | None:
        """Return the experts that a call uses; None for all, or where that cannot be seen.

        Numbers beyond the last stand for experts of other processes.
        """
        try:
            index = self._signature.bind(*args, **kwargs).arguments.get(_INDEX)
        except TypeError:
            return None  # the call itself will say so
        if not isinstance(index, torch.Tensor) or index.dtype not in _INTEGERS:
            return None
        used = torch.unique(index.detach()).tolist()
        rows = frozenset(row for row in used if 0 <= row < self._count)
        return rows if len(rows) < self._count else None


_INTEGERS = (torch.int64, torch.int32)
