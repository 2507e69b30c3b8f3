"""RowGuard: no operator reads rows of a parameter that are not in memory.

It is active while a module runs that has some rows only. Operators that make views read nothing.
Of the others, those that are known to read some rows of what they are given are asked which; the
rest read all that their argument spans, and those that write are given the whole parameter. What is
not there yet is fetched before the operator runs, and the backward of this call will fetch it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload.tiers.context import RuntimeContext
from offload.tiers.scopes import RowUse
from offload.tiers.unit import OffloadedParam, Unit


class RowGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the operators of one call."""

    def __init__(self, context: RuntimeContext, uses: dict[Unit, RowUse]) -> None:
        """Watch over `uses`, which the call holds and which grow as more turns out to be needed."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._context = context
        self._uses = uses

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` with all that it reads in memory."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_inference_mode_enabled():  # where composite operators come as they are
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if not _makes_view(func):
                for tensor in _tensors(chain(args, kwargs.values())):
                    self._check(func, args, kwargs, tensor)
            return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: Any, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        param = self._context.pointers.by_address.get(tensor.untyped_storage().data_ptr())
        use = None if param is None else self._uses.get(param.unit)
        if param is None or use is None or not param.rows or not tensor.numel():
            return
        needed = frozenset(_rows_read(func, args, kwargs, tensor, param))
        if not needed <= use.rows:
            use.rows |= needed
            with self._context.lock:
                self._context.attach(param.unit, use.rows)


def _rows_read(
    func: Any, args: Any, kwargs: Any, tensor: torch.Tensor, param: OffloadedParam
) -> Iterable[int]:
    """Return the rows of `param` that `func` may read of its argument `tensor`."""
    if any(tensor is written for written in _written(func, args, kwargs)):
        return range(param.rows)
    row_bytes = param.nbytes // param.rows
    begin = tensor.storage_offset() * tensor.itemsize
    reader = _READERS.get(func.name())
    if reader is not None and not begin and _is_of_rows(tensor, param, row_bytes):
        rows = reader(tensor, *args, **kwargs)
        if rows is not None:
            return rows
    end = begin + _span(tensor.shape, tensor.stride()) * tensor.itemsize
    return range(begin // row_bytes, -(-end // row_bytes))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments of an operator, and in its lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the arguments that `func` writes to."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | kwargs
    written = [
        given.get(arg.name)
        for arg in func._schema.arguments
        if arg.alias_info is not None and arg.alias_info.is_write
    ]
    return list(_tensors(written))


def _is_of_rows(tensor: torch.Tensor, param: OffloadedParam, row_bytes: int) -> bool:
    """Whether the first dimension of `tensor`, which begins with `param`, is its rows."""
    stride, shape = tensor.stride(), tensor.shape
    return (
        tensor.dim() > 1
        and shape[0] == param.rows
        and stride[0] * tensor.itemsize == row_bytes
        and _span(shape[1:], stride[1:]) * tensor.itemsize <= row_bytes
    )


def _span(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Return how many elements lie between the first and the last of a tensor, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


@cache
def _makes_view(func: Any) -> bool:
    """Whether `func` returns a view of what it is given, and writes nothing."""
    schema = func._schema
    aliases = [arg.alias_info for arg in schema.arguments if arg.alias_info is not None]
    return bool(aliases) and not schema.is_mutable


def _indexed(
    tensor: torch.Tensor, source: torch.Tensor, indices: Iterable[torch.Tensor | None]
) -> list[int] | None:
    """Indexing, ``source[indices]``."""
    first = next(iter(indices), None)
    if source is not tensor or first is None or first.dtype in (torch.bool, torch.uint8):
        return None
    return [row % source.shape[0] for row in torch.unique(first).tolist()]


def _grouped(
    tensor: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> list[int] | None:
    """A product of each group of rows of `inputs`, which ends at `offs`, with a row of `weight`."""
    if weight is not tensor or offs is None or inputs.dim() != 2:
        return None
    ends = [0, *offs.tolist()]
    return [row for row in range(len(ends) - 1) if ends[row + 1] > ends[row]]


_READERS: dict[str, Callable[..., list[int] | None]] = {
    "aten::index.Tensor": _indexed,
    "aten::_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
}
"""Which rows of their argument operators read; None: all that it spans."""
