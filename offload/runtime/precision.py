"""Mixed precision: which parameters are kept in ``Policy.param_dtype``, and what follows.

The semantics are those of FSDP's mixed precision, per module and not per operator as in autocast:
parameters, and hence activations and gradients, are in the narrow dtype; floating point inputs of
the model's forward are cast to it, outputs and buffers stay as they are. Parameters of batch and
instance norms stay fp32, as their running statistics are: torch's kernels want these alike, and
take narrow inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from offload.errors import UnsupportedError
from offload.tiers.unit import Unit, owner_of

Dtypes = Mapping[nn.Parameter, torch.dtype]


def compute_dtypes(model: nn.Module, param_dtype: object | None) -> Dtypes:
    """Return the dtype that each parameter of `model` is to be kept and computed with in.

    Args:
        model: not changed.
        param_dtype: torch.bfloat16, torch.float16 or None.

    Raises:
        UnsupportedError: a floating point or complex parameter that is neither fp32 nor in
            `param_dtype`, or one to be narrowed that has a gradient already.
    """
    dtypes = {param: param.dtype for param in model.parameters()}
    if not isinstance(param_dtype, torch.dtype):
        return dtypes
    norms = (module for module in model.modules() if isinstance(module, _NormBase))
    kept = {param for module in norms for param in module.parameters(recurse=False)}
    for name, param in model.named_parameters():
        if param.dtype is param_dtype or not (param.is_floating_point() or param.is_complex()):
            continue
        if param.dtype is not torch.float32:
            raise UnsupportedError(
                f"{name} is {param.dtype}, and Policy(param_dtype={param_dtype}) is for fp32 "
                "parameters: its masters are fp32; convert it before offload.wrap()"
            )
        if param in kept:
            continue
        if param.grad is not None:
            raise UnsupportedError(
                f"{name} has a fp32 gradient, and with Policy(param_dtype={param_dtype}) gradients "
                "are in that dtype; set it to None (zero_grad()) before offload.wrap()"
            )
        dtypes[param] = param_dtype
    return dtypes


def add_precision_hooks(model: nn.Module, units: Sequence[Unit]) -> RemovableHandle:
    """Cast what the forward of `model` is given, and refuse optimizers without masters.

    Args:
        model: wrapped; some of its parameters are narrowed.
        units: its.
    """
    narrow = next(unit.params[0].dtype for unit in units if unit.is_narrowed)
    _watch_optimizers()

    def cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _narrowed(args, narrow), _narrowed(kwargs, narrow)

    return model.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)


def _narrowed(values: Any, dtype: torch.dtype) -> Any:
    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return tree_map_only(torch.Tensor, cast, values)


@cache
def _watch_optimizers() -> None:
    """Have every optimizer's step refused that would update narrowed parameters without masters."""
    register_optimizer_step_pre_hook(_refuse)


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "keeps_masters", False):
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            owner = None if param.grad is None else owner_of(param)
            if owner is not None and owner.is_narrowed:
                raise UnsupportedError(
                    f"{type(optimizer).__name__}.step() would update {owner.name} in {owner.dtype} "
                    "and keep nothing in fp32: with Policy(param_dtype=...) use an optimizer of "
                    "offload.optim, which updates the fp32 masters"
                )
