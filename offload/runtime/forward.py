"""Forward hooks: a module's units are fetched before it runs and released after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.runtime.experts import Routing, is_routed
from offload.runtime.row_guard import RowGuard
from offload.runtime.saved_tensors import SavedTensorHooks
from offload.tiers.context import RuntimeContext
from offload.tiers.scopes import RowUse
from offload.tiers.uncompiled import uncompiled
from offload.tiers.unit import Rows, Unit
from offload.trace import Phase


class ForwardHooks:
    """The hooks on the modules of one wrapped model.

    Protocol of a module's forward:
     1. enter: open a scope; fetch and hold the module's units, or the rows that its arguments name
        (experts.py); activate the saved-tensor hooks.
     2. the module runs; spilled parameters of other units that it touches join its scope.
     3. leave, also after an exception: the units of the scope are released, newest scope first.
    A scope that was never left (KeyboardInterrupt skips forward hooks) is cleared when its thread's
    next outermost forward begins. Each thread has scopes of its own.
    """

    def __init__(
        self, context: RuntimeContext, saved: SavedTensorHooks, on_reset: Callable[[], None]
    ) -> None:
        """Hooks are added with add(); `on_reset` is called when an interrupted pass is cleared."""
        self._context = context
        self._saved = saved
        self._on_reset = on_reset
        self._trainer: threading.Thread | None = None
        self._outer: dict[nn.Module, set[nn.Module]] = {}
        """For each module those with hooks that contain it, itself among them."""
        self._units: dict[nn.Module, list[Unit]] = {}
        self.on_pass: Callable[[], None] = _nothing
        """Called when an outermost forward begins."""
        self.handles: list[RemovableHandle] = []

    def add(self, module: nn.Module, units: list[Unit]) -> None:
        """Fetch `units` whenever `module` runs; what it touches beyond them is let go after it."""
        self._units[module] = units
        for inner in module.modules():
            self._outer.setdefault(inner, set()).add(module)

        counts = [param.rows for unit in units for param in unit.params if param.rows]
        routing = Routing(module, counts[0]) if counts and is_routed(module) else None

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            with self._context.lock:
                rows = None if routing is None else routing.rows(args, kwargs)
                self._enter(module, units, rows)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            with self._context.lock:
                self._leave(module)

        before = module.register_forward_pre_hook(uncompiled(enter), prepend=True, with_kwargs=True)
        self.handles.append(before)
        self.handles.append(module.register_forward_hook(uncompiled(leave), always_call=True))

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

    def _enter(self, module: nn.Module, units: list[Unit], rows: Rows = None) -> None:
        context = self._context
        if self._is_stale(module):
            self.reset()
        if not context.scopes.mine and torch._C._current_graph_task_id() == -1:
            context.prefetcher.begin_pass()
            if torch.is_grad_enabled():
                self._trainer = threading.current_thread()
            self.on_pass()
        scope = context.scopes.open(module)
        scope.hooks_pushed = self._saved.push()
        for unit in units:
            used = rows if context.goes_by_row(unit) else None
            if unit.by_row:
                unit.routed = used
                if torch.is_grad_enabled():
                    unit.saved_rows = None
            if used is not None:
                scope.by_row[unit] = RowUse(used)
            context.acquire(unit, Phase.FORWARD, used)
            scope.units.append(unit)
        if scope.by_row:
            guard = RowGuard(context, scope.by_row)
            guard.__enter__()  # type: ignore[no-untyped-call]
            scope.guard = guard

    def _leave(self, module: nn.Module) -> None:
        if not any(scope.module is module for scope in self._context.scopes.mine):
            return  # its scope was cleared: an exception ended the forward around it
        while self._close_innermost() is not module:
            pass

    def _close_innermost(self) -> nn.Module:
        scope = self._context.scopes.close()
        if scope.guard is not None:
            scope.guard.__exit__(None, None, None)
        if scope.hooks_pushed:
            self._saved.pop()
        for unit in scope.units + scope.touched:
            self._context.release(unit)
        return scope.module

    def reset(self) -> None:
        """Clear scopes that this thread's interrupted forward or backward left behind."""
        while self._context.scopes.mine:
            self._close_innermost()
        self._on_reset()
        self._context.recover()

    def _is_stale(self, module: nn.Module) -> bool:
        """Whether what is open in this thread cannot be a caller of `module`."""
        if torch._C._current_graph_task_id() != -1:
            return False  # a recomputation inside a backward
        scopes = self._context.scopes.mine
        if scopes:
            return module is scopes[0].module or scopes[0].module not in self._outer[module]
        # A backward is no longer running when the thread that trains begins a forward.
        trainer = self._trainer
        mine = trainer is None or trainer is threading.current_thread() or not trainer.is_alive()
        return bool(self._context.gradients.in_backward) and mine


def _nothing() -> None:
    pass
