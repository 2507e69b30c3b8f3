"""Ctrl-C before a line of chosen functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any


class Interrupter:
    """Raises KeyboardInterrupt before line number `line` of those of `functions` that run.

    A trace function, for sys.settrace(). Lines are counted over all calls from 0; `left` is
    negative once it has raised.
    """

    def __init__(self, functions: Iterable[Callable[..., Any]], line: int) -> None:
        self._traced = {function.__code__ for function in functions}
        self.left = line

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in self._traced:
            return None
        if event == "line" and self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self


def interrupted(
    functions: Iterable[Callable[..., Any]], line: int, work: Callable[[], object]
) -> bool:
    """Do the work until Ctrl-C comes, before that line of `functions`; return whether it came."""
    interrupter = Interrupter(functions, line)
    sys.settrace(interrupter)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return interrupter.left < 0
