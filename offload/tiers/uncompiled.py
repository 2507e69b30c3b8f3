"""uncompiled(): what torch.compile has to run as it is written.

Hooks change what a parameter is and wait for the disk. Traced, that would happen once, while the
graph is made, and not when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Return `function` such that torch.compile traces neither it nor what it calls."""
    untraced: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced


def uncompiled_later(function: F) -> F:
    """Do the same for a method, without importing the compiler until it is first called."""
    return cast(F, _disable_dynamo(function))
