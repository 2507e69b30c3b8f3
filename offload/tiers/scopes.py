"""ForwardScopes: which units each module that is in forward holds, by thread."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from offload.tiers.unit import Unit


@dataclass(eq=False)
class RowUse:
    """What one call uses of a unit: `rows` of the parameters that have any, and the others.

    What autograd saved in the call refers to this, and more rows may be found to be needed.
    """

    rows: frozenset[int]


@dataclass
class Scope:
    """One call of a module.

    Attributes:
        units: held until the call ends.
        touched: used from outside of their own modules; held until the call ends or there is no
            room for others.
        hooks_pushed: saved-tensor hooks were activated for it.
        by_row: what it uses of those of `units` that it does not use whole.
        guard: sees to it that it uses no other rows.
    """

    module: nn.Module
    units: list[Unit] = field(default_factory=list)
    touched: list[Unit] = field(default_factory=list)
    hooks_pushed: bool = False
    by_row: dict[Unit, RowUse] = field(default_factory=dict)
    guard: AbstractContextManager[object] | None = None


class ForwardScopes:
    """The calls that are open, per thread, outermost first; a thread sees its own alone.

    Not thread-safe: the owner's lock serialises.
    """

    def __init__(self) -> None:
        """No call is open."""
        self._open: dict[int, list[Scope]] = {}

    @property
    def mine(self) -> list[Scope]:
        """Those of this thread; change them with open() and close()."""
        return self._open.get(threading.get_ident(), [])

    def row_use(self, unit: Unit) -> RowUse | None:
        """Return what the innermost call of this thread that does not use `unit` whole uses."""
        for scope in reversed(self.mine):
            if unit in scope.by_row:
                return scope.by_row[unit]
        return None

    @property
    def none_open(self) -> bool:
        """Whether no thread is in forward."""
        return not self._open

    def others_hold(self, unit: Unit) -> bool:
        """Whether a call in another thread uses `unit`."""
        mine = threading.get_ident()
        return any(
            unit in scope.units or unit in scope.touched
            for thread, scopes in self._open.items()
            if thread != mine
            for scope in scopes
        )

    def open(self, module: nn.Module) -> Scope:
        """Begin a call of `module` in this thread."""
        scope = Scope(module)
        self._open.setdefault(threading.get_ident(), []).append(scope)
        return scope

    def close(self) -> Scope:
        """End this thread's innermost call."""
        thread = threading.get_ident()
        scope = self._open[thread].pop()
        if not self._open[thread]:
            del self._open[thread]
        return scope
