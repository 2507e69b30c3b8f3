"""Helpers of the tests of spill(): policies with little memory, parameters, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload import Budget, Policy

SHAPES = [(31, 47), (997,), (3, 5, 61), (), (1,), (40, 40), (64, 17), (13, 7, 2, 5), (1201,)]


def policy(folder: Path | None, host: int = 32 << 10, disk: int | None = None) -> Policy:
    """A few pages of memory, and small blocks."""
    return Policy(
        Budget(host, disk=disk), swap_dir=folder, io_block_bytes=1 << 16, calibrate_disk=False
    )


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Parameters with the same values at each call; one is transposed."""
    generator = torch.Generator().manual_seed(1)
    made = [noise(shape, dtype, generator) for shape in shapes]
    return [nn.Parameter(v.t() if i == 5 and v.dim() == 2 else v) for i, v in enumerate(made)]


def noise(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    precise = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=precise).to(dtype)


def set_gradients(step: int, *models: Sequence[torch.Tensor]) -> None:
    """Give the parameters of all models the same gradients, of which some are missing."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, alike in enumerate(zip(*models, strict=True)):
        grad = noise(alike[0].shape, alike[0].dtype, generator)
        for param in alike:
            missing = step == 1 and i == 2
            param.grad = None if missing else torch.empty_like(param).copy_(grad)


def disk_bytes(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes that an optimizer on plain parameters has written and read."""
    home = optimizer._spill._home  # type: ignore[attr-defined]
    stats = home.store.stats()
    return stats["bytes_written"], stats["bytes_read"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1) for t in (a, b)]
    return a.numel() == 0 or torch.equal(*(t.view(torch.uint8) for t in flat))


def assert_same_params(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(a, b), f"parameter {i} of shape {tuple(a.shape)}"


def assert_same_dicts(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal state_dicts: keys, order, types, strides and bits."""
    assert list(ours) == list(theirs)
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for key, state in theirs["state"].items():
        found = ours["state"][key]
        assert list(found) == list(state), key
        for what, value in state.items():
            assert type(found[what]) is type(value), (key, what)
            if isinstance(value, torch.Tensor):
                assert same_bits(found[what], value), (key, what)
                assert found[what].stride() == value.stride(), (key, what)
            else:
                assert found[what] == value, (key, what)


def state_pages(optimizer: Optimizer) -> int:
    """Bytes that the state of a real optimizer takes, in pages for each parameter."""
    sizes = [
        sum(v.numel() * v.itemsize for v in state.values() if isinstance(v, torch.Tensor))
        for state in optimizer.state.values()
    ]
    return sum(-(-size // 4096) * 4096 for size in sizes if size > 256)
