"""Activations: which saved tensors of a wrapped model are moved.

Only those that lie in ordinary memory or a device's, belong to one forward, and are waited for by
a backward that comes later. So parameters and buffers are left alone, and so is what a
recomputation inside of a backward saves, which is used at once.
"""

from __future__ import annotations

import torch
from torch import nn

from offload.tiers.activation_handle import Handle
from offload.tiers.activation_home import ActivationHome


class Activations:
    """Saves and loads the activations of one model.

    Attributes:
        home: where they are.
    """

    def __init__(self, model: nn.Module, home: ActivationHome) -> None:
        """Move the activations of `model` to `home`."""
        self._model = model
        self.home = home
        self._buffers: set[int] = set()

    def begin_pass(self) -> None:
        """An outermost forward begins: see which buffers the model has now."""
        if torch.is_grad_enabled():
            self._buffers = {
                buffer.untyped_storage().data_ptr()
                for buffer in self._model.buffers()
                if self._is_movable(buffer)
            }

    def save(self, tensor: torch.Tensor) -> Handle | None:
        """Return what stands for `tensor` until the backward; None: it is left alone.

        Raises:
            BudgetError, SwapSpaceError, SwapIOError: see ActivationHome.save.
        """
        if in_backward() or not self._is_movable(tensor):
            return None
        if tensor.untyped_storage().data_ptr() in self._buffers:
            return None
        return self.home.save(tensor)

    def load(self, handle: Handle) -> torch.Tensor:
        """Return the tensor that `handle` stands for; see ActivationHome.load."""
        return self.home.load(handle)

    def _is_movable(self, tensor: torch.Tensor) -> bool:
        """Whether the bytes of its storage are all there is to it, in memory of ours or torch's.

        Parameters are no activations.
        """
        carrier = self.home.carrier
        return (
            type(tensor) is torch.Tensor
            and (
                tensor.device.type == "cpu"
                or (carrier is not None and carrier.device_of(tensor) is not None)
            )
            and tensor.layout is torch.strided
            and not tensor.is_quantized
            and not tensor.is_conj()
            and not tensor.is_neg()
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        )


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
