"""One native step of Adafactor on one parameter: torch's, without arrays of the parameter's size.

What torch does on Python numbers, and on the mean of the rows' variances, is done here, by the
same expressions; the passes over the gradient and the parameter are native (optim/adafactor.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from offload import _native
from offload.optim.aten_norm import norm_order
from offload.optim.aten_rounding import aten_rounding
from offload.optim.state_dict import scalar_dtype
from offload.tiers.cpu_share import cpu_share

Group = dict[str, Any]


def is_native(param: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether take_step() can update `param`: torch sums others up in another order."""
    return param.numel() > 0 and param.is_contiguous() and grad.is_contiguous()


def take_step(
    group: Group,
    state: dict[str, Any],
    param: torch.Tensor,
    grad: torch.Tensor,
    factors: Sequence[float],
    narrow: torch.Tensor | None,
    arrays: _native.UpdateFormat,
) -> None:
    """Take one step on `param`, in place.

    Args:
        group: hyperparameters, as ``torch.optim.Adafactor``'s.
        state: as torch's, of this parameter; changed in place, and begun where it was not.
        param: fp32: the parameter, or the master of a 16-bit one. is_native() with `grad`.
        grad: of its shape; in the type of `arrays`'s parameters.
        factors: still to be multiplied onto the gradient, in this order.
        narrow: the 16-bit parameter, which is written; None for an fp32 one.
        arrays: the format of the parameter.

    Raises:
        ValueError: a tensor in `state` has not the shape that belongs to the parameter.
    """
    shape = param.shape
    is_matrix = param.dim() > 1
    if "step" not in state:
        _begin(state, param)
    if is_matrix:
        row_var = _statistic(state, "row_var", (*shape[:-1], 1))
        col_var = _statistic(state, "col_var", (*shape[:-2], 1, shape[-1]))
        rows, cols = shape[-2:]
    else:
        variance = _statistic(state, "variance", tuple(shape))
        rows = cols = 1
    numel = param.numel()
    step = _native.AdafactorStep(
        arrays,
        numel // (rows * cols),
        rows,
        cols,
        param=param.data_ptr(),
        narrow=0 if narrow is None else narrow.data_ptr(),
        grad=grad.data_ptr(),
        factors=list(factors),
        row_var=row_var.data_ptr() if is_matrix else 0,
        col_var=col_var.data_ptr() if is_matrix else 0,
        variance=0 if is_matrix else variance.data_ptr(),
        order=norm_order(),
        fma=aten_rounding().fma,
        threads=_threads(),
        isa=_native.best_isa(),
    )

    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        lr = lr.reshape(())
    eps1, eps2 = group["eps"]
    if eps1 is None:
        eps1 = torch.finfo(param.dtype).eps
    state["step"] += 1
    count = state["step"].item()
    rho = min(lr, 1 / (count**0.5))
    alpha = max(eps2, step.param_norm() / (numel**0.5)) * rho
    decay = 1 - lr * group["weight_decay"] if group["weight_decay"] != 0 else 1.0
    step.take_statistics(count ** group["beta2_decay"])
    mean = row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1) if is_matrix else None
    address = 0 if mean is None else mean.data_ptr()
    floor = eps1 * eps1
    norm = step.update_norm(address, floor)
    denominator = max(1.0, norm / ((numel**0.5) * group["d"]))
    by = float(-alpha / denominator)
    step.apply(address, floor, float(decay), -by if group["maximize"] else by)


def _begin(state: dict[str, Any], param: torch.Tensor) -> None:
    shape = param.shape
    state["step"] = torch.tensor(0.0, dtype=scalar_dtype())
    if param.dim() > 1:
        state["row_var"] = torch.zeros((*shape[:-1], 1))
        state["col_var"] = torch.zeros((*shape[:-2], 1, shape[-1]))
    else:
        state["variance"] = torch.zeros(shape)


def _statistic(state: dict[str, Any], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor in `state`, as the native core needs it from now on."""
    tensor: torch.Tensor = state[name]
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)}; that of this parameter has {shape}"
        )
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        tensor = state[name] = tensor.to(torch.float32).contiguous()
    return tensor


@cache
def _threads() -> int:
    return cpu_share()
