"""Finding out in what order this process's torch sums up norms, for the bits of Adafactor.

How wide ATen's kernels are, and where they fuse multiply and add, depends on how torch was built
and on the CPU. It cannot be asked for, and shows in norms of a sample.
"""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product

import torch

from offload import _native

_LANES = (8, 4, 16)
_RESTS = ((0, False), (0, True), (4, True))
_ROWS, _COLUMNS = 500, 111  # the rounding of each row's and column's sum tells orders apart


@cache
def norm_order() -> _native.NormOrder:
    """Return the order with which the native norms match ``torch.norm`` bit for bit.

    Warns (once) when none of the known ones does: Adafactor's steps are then right to the precision
    of torch's sums, but not the same bits.
    """
    matrix = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0))
    expected = [
        torch.norm(matrix, dim=dim, keepdim=True).square_().div_(matrix.size(dim))
        for dim in (-1, -2)
    ]
    flags = (False, True)
    for lanes, in_lanes, (group, rest), columns in product(_LANES, flags, _RESTS, flags):
        order = _native.NormOrder(
            lanes,
            fuse_lanes=in_lanes,
            rest_group=group,
            fuse_rest=rest,
            fuse_columns=columns,
        )
        if all(map(torch.equal, _native_means(matrix, order), expected)):
            return order
    warnings.warn(
        "offload.optim.Adafactor: this torch build sums up norms in an order that is not known "
        f"here (capability {torch.backends.cpu.get_cpu_capability()}); updates will differ from "
        "torch.optim.Adafactor by the rounding of its sums",
        stacklevel=2,
    )
    return _native.NormOrder(8, fuse_lanes=False, rest_group=0, fuse_rest=False, fuse_columns=False)


def _native_means(matrix: torch.Tensor, order: _native.NormOrder) -> list[torch.Tensor]:
    rows, columns = torch.zeros(_ROWS, 1), torch.zeros(1, _COLUMNS)
    step = _native.AdafactorStep(
        _native.UpdateFormat(),
        1,
        _ROWS,
        _COLUMNS,
        param=matrix.data_ptr(),
        narrow=0,
        grad=matrix.data_ptr(),
        factors=[],
        row_var=rows.data_ptr(),
        col_var=columns.data_ptr(),
        variance=0,
        order=order,
        fma=True,
        threads=1,
        isa=_native.best_isa(),
    )
    step.take_statistics(1.0)
    return [rows, columns]
