"""What every contestant of benchmarks/optim.py has: the same parameters, gradients, threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

LR = 1e-4
WEIGHT_DECAY = 0.01


def gpt_shapes(layers: int, width: int) -> list[list[int]]:
    """The shapes of examples/gpt.py's parameters: matrices, norms and biases as they are mixed."""
    block = [[width], [width], [3 * width, width], [3 * width], [width, width], [width]]
    block += [[width], [width], [4 * width, width], [4 * width], [width, 4 * width], [width]]
    return [[256, width], [1024, width], *(layers * block), [width], [width], [256, width]]


def use_threads(count: int) -> None:
    """Lets this process compute on `count` of its cores, whichever way it finds out about them.

    REQUIRES: nothing was computed yet: threads that exist keep their cores.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def make_parameters(shapes: Sequence[Sequence[int]]) -> list[torch.nn.Parameter]:
    """fp32 parameters with gradients, the same values in each process."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(*shape, generator=generator).mul_(0.02))
        parameter.grad = torch.randn(*shape, generator=generator).mul_(1e-3)
        parameters.append(parameter)
    return parameters


def disk_bytes() -> tuple[int, int]:
    """(read, written): what this process has had moved from and to disks so far."""
    fields = {}
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value)
    return fields["read_bytes"], fields["write_bytes"]
