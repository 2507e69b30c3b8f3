"""Updates of a wrapped model that are interrupted, against those of its plain twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from interrupter import interrupted
from torch import nn
from torch.optim import Optimizer

from offload.runtime.wrapped import wrapped


def small() -> nn.Module:
    """A model of two units, that takes (n, 129)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(129, 331), nn.Linear(331, 129))


def first_line_not_reached(
    functions: Iterable[Callable[..., Any]],
    lines: Iterable[int],
    twins: Iterable[tuple[nn.Module, Optimizer]],
) -> int:
    """Take a step for each of `lines`, and interrupt its updates before that line of `functions`.

    The first of the twins is wrapped. After each step their bits are equal. Ends with the first
    line that no update comes to, and returns it.
    """
    twins, functions = list(twins), list(functions)
    (model, _), (plain, _) = twins
    context, x = wrapped(model).context, torch.randn(3, 129)

    def flush() -> None:
        with context.lock:
            context.flush()

    for line in lines:
        for each, optimizer in twins:
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
        came = interrupted(functions, line, flush)
        flush()
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(a, b), line
        if not came:
            return line
    raise AssertionError("the updates have more lines")
