"""deferred_init(): modules whose parameters are never in RAM all at once.

Initialisation runs as it always does: each operator once, in order, on the same generator, so the
values and the generator's state afterwards are those of an eager run whatever the code does. What
differs is where results lie: an operator that makes a tensor of more than SMALL_BYTES gets it in
ScratchMemory. Finished tensors leave RAM for the file, and come back when they are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from offload.errors import PolicyError
from offload.runtime.scratch_memory import (
    Region,
    ScratchMemory,
    is_plain,
    region_of,
    scratch_folder,
)

SMALL_BYTES = 64 << 10
"""Tensors up to this size stay in memory: norms, biases, tables."""
_WINDOW_BYTES = 64 << 20

aten = torch.ops.aten
_UNINITIALISED = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class _DeferredInit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Places the results of operators in scratch memory."""

    def __init__(self, scratch: ScratchMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scratch = scratch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch not to import its compiler (80 MiB) only to keep out of this class."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on what it is given, and move what it makes."""
        kwargs = kwargs or {}
        inputs = [value for value in tree_iter((args, kwargs)) if is_plain(value)]
        used = [region for value in inputs if (region := region_of(value)) is not None]
        self.scratch.use(region for region in used if region.memory is self.scratch)
        if func in _UNINITIALISED and _on_cpu(args, kwargs):
            # Not made in ordinary memory first, of which there may be less.
            planned = func(*args, **{**kwargs, "device": "meta", "pin_memory": False})
            if planned.layout is torch.strided and _storage_bytes(planned) > SMALL_BYTES:
                return self._empty_as(planned)
        result = func(*args, **kwargs)
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return result  # a view, or what was written in place
        given = {value.untyped_storage().data_ptr() for value in inputs}

        def moved(value: torch.Tensor) -> torch.Tensor:
            if not is_plain(value) or _storage_bytes(value) <= SMALL_BYTES:
                return value
            if value.untyped_storage().data_ptr() in given or region_of(value) is not None:
                return value
            return self._empty_as(value).copy_(value)

        return tree_map_only(torch.Tensor, moved, result)

    def _empty_as(self, like: torch.Tensor) -> torch.Tensor:
        storage = self.scratch.storage(_storage_bytes(like))
        empty = torch.empty(0, dtype=like.dtype, device="cpu")
        return empty.set_(storage, 0, like.shape, like.stride())


def _on_cpu(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a factory called so makes a tensor on the CPU."""
    device = kwargs.get("device")
    if device is None:
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        return like is None or is_plain(like)
    return torch.device(device).type == "cpu" and not kwargs.get("pin_memory")


def _storage_bytes(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.dtype.itemsize


@contextmanager
def deferred_init(folder: str | None) -> Iterator[None]:
    """See offload.deferred_init.

    Within another one it only does what that one does already.
    """
    outer = _active()
    if outer is not None:
        if folder not in (None, outer.scratch.folder):
            raise PolicyError(
                f"deferred_init(swap_dir={folder!r}) within one that uses {outer.scratch.folder!r}"
            )
        yield
        return
    scratch = ScratchMemory(scratch_folder(folder), _WINDOW_BYTES)
    with _DeferredInit(scratch):
        yield
    scratch.write_out()


def _active() -> _DeferredInit | None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, _DeferredInit)), None)


def to_memory(tensors: Iterable[torch.Tensor]) -> None:
    """Give those of `tensors` that lie in scratch memory ordinary memory, the same objects.

    Those that share a storage go on sharing one.
    """
    by_region: dict[Region, list[torch.Tensor]] = {}
    for tensor in tensors:
        region = region_of(tensor)
        if region is not None:
            by_region.setdefault(region, []).append(tensor)
    while by_region:
        _, sharing = by_region.popitem()
        storage = sharing[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
        for tensor in sharing:
            empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
            tensor.data = empty.set_(
                storage, int(tensor.storage_offset()), tensor.shape, tensor.stride()
            )
