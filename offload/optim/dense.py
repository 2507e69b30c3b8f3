"""The AdamW update of a parameter that is an ordinary tensor in memory."""

from __future__ import annotations

from typing import Any

import torch

from offload import _native


def update_dense(
    hyper: _native.AdamWHyper, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]
) -> None:
    """Update `param` in place by `grad` (both fp32, any strides); moments are made in `state`."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    operands = [param.detach(), grad.detach(), state["exp_avg"], state["exp_avg_sq"]]
    if all(_same_dense_layout(t, operands[0]) for t in operands):
        _update(hyper, operands)
        torch.autograd.graph.increment_version(param)  # saved tensors are checked by it
        return
    copies = [t.contiguous() for t in operands]
    _update(hyper, copies)
    for k in (0, 2, 3):
        operands[k].copy_(copies[k])


def _same_dense_layout(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return bool(dense) and tensor.stride() == other.stride()


def _update(hyper: _native.AdamWHyper, operands: list[torch.Tensor]) -> None:
    param, grad, exp_avg, exp_avg_sq = operands
    _native.adamw_update(
        hyper,
        [],
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        param.numel(),
        _native.best_isa(),
    )
