"""Stepping inside the backward: each gradient is applied as soon as it is there, and not kept.

Protocol, for an optimizer with ``step_in_backward=True``:
 1. a parameter in memory is updated when autograd has accumulated its gradient; those of a
    wrapped model that moves when the gradients of their unit are complete. Hyperparameters are
    read then.
 2. ``p.grad`` becomes a SpentGrad, which refuses to be read: clipping and scaling need gradients
    that are kept. Another gradient before step() is refused too.
 3. step() has nothing left to update; it ends the step, so that the next backward is another one.
The bits are those of a step after the backward: nothing else reads a parameter between the moment
its gradient is complete and the end of the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from offload.errors import UnsupportedError
from offload.optim.param_state import ParamState
from offload.tiers.spent_grad import SpentGrad
from offload.tiers.unit import OffloadedParam, owner_of, set_consumer

Apply = Callable[[Sequence[torch.Tensor]], None]


class BackwardSteps:
    """The hooks by which one optimizer learns of gradients."""

    def __init__(self, apply: Apply, name: str) -> None:
        """Call `apply` (a method, referred to weakly) with parameters whose gradients are there.

        Args:
            apply: updates them.
            name: of the optimizer, for messages.
        """
        self._apply = weakref.WeakMethod(apply)
        self._name = name

    def watch(self, params: Iterable[torch.Tensor]) -> None:
        """Let the gradients of `params` be applied in the backward."""
        apply, name = self._apply, self._name

        def take(owners: Sequence[OffloadedParam]) -> None:
            _step(apply, name, [owner.param for owner in owners])

        def after_accumulation(param: torch.Tensor) -> None:
            owner = owner_of(param)
            if owner is None or owner.context.resident:
                _step(apply, name, [param])

        for param in params:
            set_consumer(param, take)
            if param.requires_grad:
                register: Any = param.register_post_accumulate_grad_hook
                register(after_accumulation)


def _step(apply: weakref.WeakMethod[Apply], name: str, params: Sequence[torch.Tensor]) -> None:
    method = apply()
    if method is None:
        return  # the optimizer is gone: its gradients are nobody's
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            f"{name}(step_in_backward=True) would apply gradients before they are reduced over the "
            "process group; use step_in_backward=False"
        )
    method(params)


def spend(kept: Iterable[ParamState]) -> None:
    """Drop the gradients that were applied."""
    for state in kept:
        name = "a parameter" if state.owner is None else state.owner.name
        state.param.grad = SpentGrad(state.param, name)


def end_backward_step(param_groups: Iterable[dict[str, Any]]) -> None:
    """The step is over: the next gradients are those of another one."""
    for group in param_groups:
        for param in group["params"]:
            if isinstance(param.grad, SpentGrad):
                param.grad = None
