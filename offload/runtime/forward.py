"""Forward hooks: a module's units are fetched before it runs and released after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.runtime.saved_tensors import SavedTensorHooks
from offload.tiers.context import RuntimeContext
from offload.tiers.unit import Unit
from offload.trace import Phase


class ForwardHooks:
    """The hooks on the modules of one wrapped model.

    Protocol of a module's forward:
     1. enter: open a scope; fetch and hold the module's units; activate the saved-tensor hooks.
     2. the module runs; spilled parameters of other units that it touches join its scope.
     3. leave, also after an exception: the units of the scope are released, newest scope first.
    A scope that was never left (KeyboardInterrupt skips forward hooks) is cleared when the next
    outermost forward begins.
    """

    def __init__(
        self, context: RuntimeContext, saved: SavedTensorHooks, on_reset: Callable[[], None]
    ) -> None:
        """Hooks are added with add(); `on_reset` is called when an interrupted pass is cleared."""
        self._context = context
        self._saved = saved
        self._on_reset = on_reset
        self._pushed: list[bool] = []
        self._open: list[nn.Module] = []
        self._units: dict[nn.Module, list[Unit]] = {}
        self.on_pass: Callable[[], None] = _nothing
        """Called when an outermost forward begins."""
        self.handles: list[RemovableHandle] = []

    def add(self, module: nn.Module, units: list[Unit]) -> None:
        """Fetch `units` whenever `module` runs."""
        self._units[module] = units

        def enter(module: nn.Module, args: Any) -> None:
            with self._context.lock:
                self._enter(module, units)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            with self._context.lock:
                self._leave(module)

        self.handles.append(module.register_forward_pre_hook(enter, prepend=True))
        self.handles.append(module.register_forward_hook(leave, always_call=True))

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        """Have within a block what `module` has when it runs, without calling it."""
        with self._context.lock:
            self._enter(module, self._units.get(module, []))
        try:
            yield
        finally:
            with self._context.lock:
                self._leave(module)

    def _enter(self, module: nn.Module, units: list[Unit]) -> None:
        context = self._context
        if self._is_stale(module):
            self.reset()
        if not self._open and torch._C._current_graph_task_id() == -1:
            context.prefetcher.trace.begin_pass()
            self.on_pass()
        scope: list[Unit] = []
        context.scopes.append(scope)
        self._open.append(module)
        self._pushed.append(self._saved.push())
        for unit in units:
            context.acquire(unit, Phase.FORWARD)
            scope.append(unit)

    def _leave(self, module: nn.Module) -> None:
        if module not in self._open:
            return  # its scope was cleared: an exception ended the forward around it
        while True:
            last = self._open.pop()
            if self._pushed.pop():
                self._saved.pop()
            for unit in self._context.scopes.pop():
                self._context.release(unit)
            if last is module:
                return

    def reset(self) -> None:
        """Clear scopes that were left behind by an interrupted forward or backward."""
        while self._pushed:
            if self._pushed.pop():
                self._saved.pop()
        self._open.clear()
        self._on_reset()
        self._context.recover()

    def _is_stale(self, module: nn.Module) -> bool:
        """Whether what is open cannot be a caller of `module`."""
        if torch._C._current_graph_task_id() != -1:
            return False  # a recomputation inside a backward
        if self._open:
            within = any(module is child for child in self._open[-1].modules())
            return module is self._open[0] or not within
        return bool(self._context.in_backward)


def _nothing() -> None:
    pass
