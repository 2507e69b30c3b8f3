"""Moving a model's buffers to the devices where it computes, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class MovedBuffers:
    """The buffers of one model, which lie on the device of their module while it is wrapped.

    As in ``module.to(device)`` each gets a new tensor; one that several modules have stays one, on
    the device of the first.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        elsewhere: Mapping[nn.Module, torch.device] | None = None,
    ) -> None:
        """Move those of `model` to `device`, or to that which `elsewhere` has for the module."""
        self._model = model
        self._from: dict[tuple[nn.Module, str], torch.device] = {}
        moved: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            where = (elsewhere or {}).get(module, device)
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if buffer not in moved:
                    moved[buffer] = buffer.to(where)
                if moved[buffer] is not buffer:
                    self._from[module, name] = buffer.device
                    module._buffers[name] = moved[buffer]

    def back(self) -> None:
        """Move them to where they were; those that were replaced or taken away meanwhile stay."""
        moved: dict[tuple[torch.Tensor, torch.device], torch.Tensor] = {}
        for (module, name), device in self._from.items():
            buffer = module._buffers.get(name)
            if buffer is None:
                continue
            if (buffer, device) not in moved:
                moved[buffer, device] = buffer.to(device)
            module._buffers[name] = moved[buffer, device]
        self._from.clear()
