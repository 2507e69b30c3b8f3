"""What the native optimizers can update, and what they say of what they cannot."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offload.errors import UnsupportedError
from offload.optim.param_state import MemoryState
from offload.optim.update import Update
from offload.tiers.state_layout import PARAM_DTYPES
from offload.tiers.unit import SpilledParameter, owner_of


def refused_gradient(name: str, param: torch.Tensor, grad: torch.Tensor) -> UnsupportedError:
    """Return the error for a gradient that optimizer `name` cannot use."""
    if grad.layout is not torch.strided:
        return UnsupportedError(
            f"{name} does not support sparse gradients; use sparse=False in the "
            "embedding, or torch.optim.SparseAdam"
        )
    return UnsupportedError(
        f"{name}: a {param.dtype} parameter of shape {tuple(param.shape)} has a gradient "
        f"of {grad.dtype}; expected the same type"
    )


def is_ready(update: Update) -> bool:
    """Whether all that the update needs of its state is there."""
    kept = update.kept
    if kept.layout is not update.layout:
        return False
    return not isinstance(kept, MemoryState) or kept.is_bound()


def is_supported(param: torch.Tensor) -> bool:
    """Whether the native rules can update `param`."""
    return (
        param.dtype in PARAM_DTYPES
        and (param.device.type == "cpu" or owner_of(param) is not None)
        and param.layout is torch.strided
        and (isinstance(param, SpilledParameter) or not is_traceable_wrapper_subclass(param))
    )


def describe(param: torch.Tensor) -> str:
    """Return what a message says of a parameter that is not supported."""
    kind = "" if type(param) in (torch.Tensor, torch.nn.Parameter) else f"{type(param).__name__}, "
    shape = tuple(param.shape)
    return f"one of {param.dtype} on {param.device} with shape {shape} ({kind}{param.layout})"
