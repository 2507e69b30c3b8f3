"""SpentGrad: what ``p.grad`` is once an optimizer has applied it inside the backward.

Its bytes were not kept, so it answers no question about them: gradient clipping or a GradScaler
would otherwise silently have no effect. It can be set to None or zeroed (``zero_grad``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from offload.errors import SpilledTensorError, UnsupportedError

aten = torch.ops.aten
_ZEROING = {aten.zero_.default, aten._foreach_zero_.default, aten.detach.default}


class SpentGrad(torch.Tensor):
    """A tensor of the gradient's shape and dtype without memory; see the module's text."""

    _name: str

    @staticmethod
    def __new__(cls, param: torch.Tensor, name: str) -> SpentGrad:
        """Stand for the gradient of `param`, which messages call `name`."""
        grad: SpentGrad = torch.Tensor._make_wrapper_subclass(
            cls, param.shape, dtype=param.dtype, device=param.device, requires_grad=False
        )
        grad._name = name
        return grad

    def __init__(self, param: torch.Tensor, name: str) -> None:
        """All is done by __new__."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Describe it: there are no contents."""
        return f"SpentGrad({self._name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Allow zeroing; refuse whatever needs the bytes."""
        if func in _ZEROING:
            return args[0]
        first = next(value for value in tree_leaves((args, kwargs)) if type(value) is cls)
        if func is aten.add_.Tensor:  # autograd accumulates
            raise second_gradient(first)
        raise SpilledTensorError(
            f"{func} on the gradient of {first._name}: it was applied during backward() and not "
            "kept (step_in_backward=True); clipping, scaling and reading gradients need "
            "step_in_backward=False"
        )


def second_gradient(spent: SpentGrad) -> UnsupportedError:
    """Return the error for a gradient that comes before the step that `spent` belongs to ended."""
    return UnsupportedError(
        f"{spent._name} gets another gradient before optimizer.step(): with step_in_backward=True "
        "each backward is a step of its own; accumulate gradients with step_in_backward=False"
    )
