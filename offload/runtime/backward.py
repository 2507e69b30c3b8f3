"""Backward hooks: gradients go to their slab as soon as autograd has them.

Protocol of a parameter's gradient:
 1. before accumulation, the handle of an earlier gradient is taken off ``p.grad``, so that autograd
    hands over the new gradient alone.
 2. after it, the new gradient is copied or added to the slab and ``p.grad`` is a handle.
 3. with the last gradient of a unit its slab may be written to disk and the unit is released; what
    is still open when the whole backward ends is released then.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from offload.tiers.context import RuntimeContext
from offload.tiers.grad_handle import GradHandle, GradState
from offload.tiers.spent_grad import SpentGrad, second_gradient
from offload.tiers.uncompiled import uncompiled
from offload.tiers.unit import OffloadedParam


class BackwardHooks:
    """The hooks on the gradients of one wrapped model."""

    def __init__(self, context: RuntimeContext) -> None:
        """Hooks are added with add()."""
        self._context = context
        self._waiting_for_end = False
        self._earlier: dict[OffloadedParam, GradState] = {}
        self.handles: list[RemovableHandle] = []

    def add(self, param: OffloadedParam) -> None:
        """Catch the gradients of `param`, which is attached and requires grad."""
        # Autograd holds these functions where the garbage collector cannot see it: with strong
        # references a dropped model would never be freed.
        hooks, owner = weakref.ref(self), weakref.ref(param)

        def before(grads: Any) -> None:
            this, param = hooks(), owner()
            if this is not None and param is not None:
                with this._context.lock:
                    this._take_earlier(param)

        def after(tensor: torch.Tensor) -> None:
            this, param = hooks(), owner()
            if this is not None and param is not None:
                with this._context.lock:
                    this._store(param)

        with torch.enable_grad():
            view: Any = param.param.view_as(param.param)
        node = view.grad_fn.next_functions[0][0]
        param.accumulate_grad = node
        self.handles.append(node.register_prehook(uncompiled(before)))
        register: Any = param.param.register_post_accumulate_grad_hook
        self.handles.append(register(uncompiled(after)))
        _run_first(param.param, self.handles[-1])

    def on_backward(self) -> None:
        """Called when a backward pass first needs something of the model."""
        if not self._waiting_for_end and torch._C._current_graph_task_id() != -1:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)
            self._waiting_for_end = True

    def reset(self) -> None:
        """An earlier backward did not come to its end."""
        self._waiting_for_end = False
        for param, state in self._earlier.items():
            if param.param.grad is None:
                param.param.grad = GradHandle(state)
        self._earlier.clear()

    def _take_earlier(self, param: OffloadedParam) -> None:
        self.on_backward()
        if isinstance(param.param.grad, SpentGrad):
            raise second_gradient(param.param.grad)
        state = param.grad_state
        if state is not None:
            self._earlier[param] = state
            param.param.grad = None

    def _store(self, param: OffloadedParam) -> None:
        new = param.param.grad
        state = self._earlier.pop(param, None)
        if new is None:
            if state is not None:
                param.param.grad = GradHandle(state)
            return
        self._context.gradients.begin_backward(param.unit)
        param.param.grad = None
        self._context.gradients.accumulate(param, new, state)

    def _end(self) -> None:
        with self._context.lock:
            self._waiting_for_end = False
            self._context.gradients.end_backward()


def _run_first(param: torch.nn.Parameter, ours: RemovableHandle) -> None:
    """Have our hook run before the user's from before wrap(): they see the whole gradient.

    Autograd goes by the order of insertion in the underlying dict, not the OrderedDict's.
    """
    hooks: Any = param._post_accumulate_grad_hooks
    for key in [key for key in hooks if key != ours.id]:
        hooks[key] = hooks.pop(key)
