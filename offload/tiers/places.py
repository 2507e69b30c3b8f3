"""Where a tensor is, and bringing it elsewhere: with several devices, as torch has it."""

from __future__ import annotations

import torch

Place = torch.device


def place_of(tensor: torch.Tensor) -> Place:
    """Return where `tensor` is."""
    return tensor.device


def moved(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """Return `tensor` at `place`: itself, or a copy through which gradients flow back.

    Between CUDA devices the copy is ordered by torch: after the work of either's current stream.
    """
    return tensor if tensor.device == place else tensor.to(place, non_blocking=True)
