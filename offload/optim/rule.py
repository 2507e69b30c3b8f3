"""Rule: what an update rule says about itself."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from offload import _native
from offload.tiers.state_layout import StateFormat


class Rule(Protocol):
    """An update rule with options; see OffloadOptimizer, whose subclasses are rules."""

    NAMES: ClassVar[tuple[str, ...]]
    state_format: StateFormat

    def initial(self, group: dict[str, Any], name: str) -> float:
        """Return what state `name` starts with."""

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with which the native rule has all of NAMES."""
