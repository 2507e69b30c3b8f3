"""SpilledAlias: what ``.detach()`` and ``.data`` of a spilled parameter return.

It shares the parameter's bytes, wherever they are: each torch function on it brings them to memory
for the call (touch.py), and a change in place lasts. It is of the parameter's shape, strides and
dtype, requires no gradient, and outlives ``unwrap()``.
"""

from __future__ import annotations

from typing import Any

import torch

from offload.tiers.uncompiled import uncompiled_later
from offload.tiers.unit import OffloadedParam, owner_of


class SpilledAlias(torch.Tensor):
    """Stands for the detached values of one parameter of a wrapped model."""

    _param: torch.nn.Parameter

    @staticmethod
    def of(owner: OffloadedParam) -> SpilledAlias:
        """Return an alias of the parameter."""
        alias = owner.placeholder.as_subclass(SpilledAlias)
        alias._param = owner.param
        return alias

    @property
    def owner(self) -> OffloadedParam | None:
        """What the wrapped model knows of the parameter; None after ``unwrap()``."""
        return owner_of(self._param)

    @classmethod
    @uncompiled_later
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on the parameter's current bytes."""
        from offload.tiers.touch import touch

        return touch(func, args, kwargs or {})
