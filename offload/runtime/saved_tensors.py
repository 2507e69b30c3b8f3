"""Saved-tensor hooks: autograd must not keep a slab's memory alive.

Within the forward of a wrapped model every tensor that autograd saves and that lies in a parameter
slab (a weight, a view such as ``weight.t()``) is replaced by a reference (parameter, offset, shape,
stride); the backward fetches its unit again. Other tensors pass through to the hooks that were
active before, such as those of activation checkpointing. Where there are none, they are activations
of the model: moved, if the policy wants that, or kept as they are.

Checkpointing counts what is saved in the forward and in the recomputation. So where it is active
outside of a module's hooks, it sees of that module only what is not replaced, both times; where it
is active inside of them, it sees all, and a weight touched by the recomputation (touch.py), which
the module's hooks do not surround, is shown to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from offload.errors import OffloadError
from offload.runtime.activations import Activations
from offload.tiers.activation_handle import Handle
from offload.tiers.context import RuntimeContext
from offload.tiers.scopes import RowUse
from offload.tiers.uncompiled import uncompiled
from offload.tiers.unit import OffloadedParam, RowsParameter, SpreadParameter

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]


def active_hooks() -> tuple[Pack, Unpack] | None:
    """Return the saved-tensor hooks that are active in this thread.

    Before torch 2.8 they cannot be asked for, and None is returned: ours then hide those of
    activation checkpointing around a unit. Results are the same, its activations are kept.
    """
    top: Callable[[bool], tuple[Pack, Unpack] | None] | None = getattr(
        torch._C._autograd, _TOP_HOOKS, None
    )
    return top(True) if top is not None else None


def active_hooks_are_known() -> bool:
    """Whether this torch tells which hooks are active."""
    return hasattr(torch._C._autograd, _TOP_HOOKS)


@dataclass(frozen=True)
class _SlabReference:
    param: OffloadedParam
    version: int
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    use: RowUse | None  # of a call that uses some rows only


@dataclass(frozen=True)
class _Kept:
    tensor: torch.Tensor
    version: int


@dataclass(frozen=True)
class _Outer:
    packed: Any
    unpack: Unpack


class SavedTensorHooks:
    """The hooks of one wrapped model."""

    def __init__(self, context: RuntimeContext, activations: Activations | None = None) -> None:
        """Hooks that replace what lies in the slabs of `context`.

        `activations`: moves what the model saves; None: autograd keeps it.
        """
        self._context = context
        self._activations = activations
        self._marker = object()
        self._pack_hook = uncompiled(self._pack)
        self._unpack_hook = uncompiled(self._unpack)

    def push(self, show: bool = False) -> bool:
        """Activate the hooks in this thread; False when they are already the active ones.

        With `show`, hooks that were active before are given what lies in a slab too, as a tensor
        that keeps its memory whatever becomes of the parameter.
        """
        if not torch.is_grad_enabled():
            return False
        top = active_hooks()
        if top is not None and getattr(top[0], "marker", None) is self._marker:
            return False
        pack = partial(self._pack_hook, top, show)
        pack.marker = self._marker  # type: ignore[attr-defined]
        pack.passes_on = top is not None  # type: ignore[attr-defined]
        torch._C._autograd._push_saved_tensors_default_hooks(pack, self._unpack_hook)
        return True

    def pop(self) -> None:
        """Deactivate what the last push() that returned True activated."""
        torch._C._autograd._pop_saved_tensors_default_hooks()

    @property
    def passes_on(self) -> bool:
        """Whether other hooks than these decide what becomes of activations at the moment."""
        top = active_hooks()
        if top is None:
            return False
        return getattr(top[0], "marker", None) is not self._marker or top[0].passes_on  # type: ignore[attr-defined]

    @contextmanager
    def active(self, show: bool = True) -> Iterator[None]:
        """Have the hooks active within a block; see push()."""
        pushed = self.push(show)
        try:
            yield
        finally:
            if pushed:
                self.pop()

    def _pack(self, outer: tuple[Pack, Unpack] | None, show: bool, tensor: torch.Tensor) -> Any:
        reference = self._reference(tensor)
        if outer is not None and (reference is None or show):
            pack, unpack = outer
            with torch._C.DisableTorchFunctionSubclass():
                shown = tensor if reference is None else tensor.detach()
            return _Outer(pack(shown), unpack)
        if reference is not None:
            return reference
        moved = self._activations.save(tensor) if self._activations is not None else None
        if moved is not None:
            return moved
        # Detached: an output that keeps itself alive through its own node would never be freed.
        return _Kept(tensor.detach(), tensor._version)

    def _reference(self, tensor: torch.Tensor) -> _SlabReference | None:
        if tensor.layout is not torch.strided or type(tensor) not in _PLAIN:
            return None
        param = self._context.pointers.by_address.get(tensor.untyped_storage().data_ptr())
        if param is None:
            return None
        use = self._context.scopes.row_use(param.unit)
        if use is not None:
            param.unit.saved_rows = use
        return _SlabReference(
            param,
            param.unit.version,
            int(tensor.storage_offset()),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            use,
        )

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Kept):
            if packed.tensor._version != packed.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: [{packed.tensor.type()} {list(packed.tensor.shape)}] is "
                    f"at version {packed.tensor._version}; expected version {packed.version}"
                )
            return packed.tensor
        if isinstance(packed, _Outer):
            return packed.unpack(packed.packed)
        if isinstance(packed, Handle):
            return self._load(packed)
        return self._fetch(packed)

    def _load(self, handle: Handle) -> torch.Tensor:
        if self._activations is None:
            raise OffloadError("an activation was moved by nobody (internal error)")
        return self._activations.load(handle)

    def _fetch(self, reference: _SlabReference) -> torch.Tensor:
        unit = reference.param.unit
        context = self._context
        with context.lock:
            if unit.version != reference.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: the parameters of {unit.name} were changed (by an "
                    "optimizer step, say) between this forward and its backward"
                )
            context.gradients.begin_backward(unit)
            context.load_for_compute(unit, reference.use.rows if reference.use else None)
            whole = context.pointers.view(reference.param)
            if whole.dtype is not reference.dtype:
                whole = whole.view(reference.dtype)
            return whole.as_strided(reference.shape, reference.stride, reference.offset)


_TOP_HOOKS = "_top_saved_tensors_default_hooks"
_PLAIN = (torch.Tensor, torch.nn.Parameter, RowsParameter, SpreadParameter)
