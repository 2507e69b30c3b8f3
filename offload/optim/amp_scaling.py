"""Gradient scaling of fp16 gradients: what ``torch.amp.GradScaler`` asks of an optimizer.

The scaler unscales fp32 gradients in place before ``step()``. Of fp16 ones it refuses that: what
the scale keeps from underflow would underflow then. An optimizer that says
``_step_supports_amp_scaling`` is told the scale instead, by attributes that are set around its
``step()``, and multiplies by its inverse in fp32, on the way to the master.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Scaling:
    """What the scaler that calls ``step()`` wants of it.

    Attributes:
        skips: a gradient has an infinity or NaN: nothing is to be updated.
        unscale: to be multiplied onto each gradient in fp32.
    """

    skips: bool = False
    unscale: float = 1.0

    @staticmethod
    def of(optimizer: Any) -> Scaling:
        """Return what was set on `optimizer`; nothing is wanted where no scaler calls."""
        found_inf: torch.Tensor | None = getattr(optimizer, "found_inf", None)
        scale: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
        if found_inf is not None and found_inf.item():
            return Scaling(skips=True)
        if scale is None:
            return Scaling()
        # As GradScaler.unscale_ does, in fp64: the inverse of an fp32 scale may underflow in fp32.
        return Scaling(unscale=scale.double().reciprocal().float().item())
