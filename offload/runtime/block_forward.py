"""BlockForward: the forward of one block, recomputed in the backward or only observed.

While a model is wrapped its blocks have this in place of their ``forward``. So hooks that a user
has on a block run once, around it, and see the outputs they always see.

Protocol of a recomputed forward (torch's non-reentrant checkpointing around the block's own):
 1. the buffers are copied, and after the forward those that it did not change are let go.
 2. autograd saves the block's inputs, which are activations like others: they may go to disk.
 3. in the backward the forward runs again, on the saved inputs, with the random state, the autocast
    mode and the buffers that it had; its units are fetched as for a forward. The buffers that the
    model has by then come back when it ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.errors import UnsupportedError
from offload.runtime.activations import in_backward
from offload.runtime.forward import ForwardHooks
from offload.runtime.saved_tensors import SavedTensorHooks

_SMALL_BUFFER_BYTES = 64 << 10
"""Buffers up to this size are copied in every recomputed forward, without asking whether it changes
them: a forward may do so in one mode only."""

_Buffer = tuple[nn.Module, str]
Observer = Callable[["BlockForward", Callable[[], Any], tuple[Any, ...]], Any]
"""Called with a block, its forward and its inputs; returns what the forward does."""


class BlockForward:
    """The forward of one block.

    Attributes:
        name: of the block in the model.
        module: the block.
        recompute: whether it is recomputed.
        observe: runs a forward that is not recomputed; None: nobody watches.
    """

    def __init__(
        self, name: str, module: nn.Module, hooks: ForwardHooks, saved: SavedTensorHooks
    ) -> None:
        """Describe the block; install() puts its forward in place."""
        self.name = name
        self.module = module
        self.recompute = False
        self.observe: Observer | None = None
        self._hooks = hooks
        self._saved = saved
        self._own: Any = module.__dict__.get("forward")
        self._forward: Callable[..., Any] = module.forward
        self._unchanged: set[tuple[_Buffer, bool]] = set()

    def install(self) -> None:
        """Replace the block's ``forward``."""

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        self.module.__dict__["forward"] = forward

    def remove(self) -> None:
        """Put the block's own ``forward`` back."""
        if self._own is not None:
            self.module.__dict__["forward"] = self._own
        else:
            self.module.__dict__.pop("forward", None)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Whoever checkpoints the block, or is recomputing it, does not want that done twice.
        if not torch.is_grad_enabled() or in_backward() or self._saved.passes_on:
            return self._forward(*args, **kwargs)
        if self.recompute:
            return self._checkpointed(args, kwargs)
        if self.observe is not None:
            return self.observe(
                self, lambda: self._forward(*args, **kwargs), (*args, *kwargs.values())
            )
        return self._forward(*args, **kwargs)

    def _checkpointed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = tuple(kwargs)
        before = self._copy_buffers()
        versions = self._versions()
        first = True

        def run(*values: Any) -> Any:
            nonlocal first
            count = len(values) - len(names)
            by_name = dict(zip(names, values[count:], strict=True))
            if first:
                first = False
                with self._saved.active(show=False):  # above checkpoint's, as in the recomputation
                    return self._forward(*values[:count], **by_name)
            with self._hooks.running(self.module), _swapped(before):
                return self._forward(*values[:count], **by_name)

        # Positional, all of them: checkpoint() has autograd save those, and others it just keeps.
        output = checkpoint(run, *args, *kwargs.values(), use_reentrant=False)
        self._keep_changed(before, versions)
        return output

    # -- buffers --------------------------------------------------------------------------------

    def _buffers(self) -> Iterator[tuple[_Buffer, torch.Tensor]]:
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield (module, name), buffer

    def _versions(self) -> dict[_Buffer, tuple[torch.Tensor, int]]:
        return {key: (buffer, buffer._version) for key, buffer in self._buffers()}

    def _copy_buffers(self) -> dict[_Buffer, torch.Tensor]:
        mode = self.module.training
        return {
            key: buffer.clone()
            for key, buffer in self._buffers()
            if buffer.nbytes <= _SMALL_BUFFER_BYTES or (key, mode) not in self._unchanged
        }

    def _keep_changed(
        self,
        before: dict[_Buffer, torch.Tensor],
        versions: dict[_Buffer, tuple[torch.Tensor, int]],
    ) -> None:
        """Let go of the copies of buffers that the forward left as they were.

        Bytes are compared: batch norm changes its statistics without counting a version.
        """
        for key, buffer in self._buffers():
            if key in before:
                if torch.equal(_bytes(buffer), _bytes(before[key])):
                    del before[key]
                    self._unchanged.add((key, self.module.training))
                continue
            known, version = versions.get(key, (None, 0))
            if buffer is not known or buffer._version != version:
                raise UnsupportedError(
                    f"the forward of {self.name} changed its buffer {key[1]}, as it did not in "
                    'earlier passes: it cannot be recomputed; use Policy(activations="disk")'
                )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@contextmanager
def _swapped(before: dict[_Buffer, torch.Tensor]) -> Iterator[None]:
    """Have copies of the buffers `before` in place of the current ones within a block."""
    current = {(module, name): module._buffers[name] for module, name in before}
    for (module, name), buffer in before.items():
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for (module, name), now in current.items():
            module._buffers[name] = now
