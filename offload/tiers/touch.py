"""touch(): what happens when code uses a parameter whose bytes are not in memory.

1. Questions about the parameter (shape, dtype, grad, hooks) are answered as they are.
2. Inside the forward of a hooked module that has rows of the parameter, it is used as it is. Else
   its unit is fetched and stays until that module's
   forward ends, or until its memory is needed: this is how a weight used outside of its own
   module is found.
3. In a recomputation inside a backward (checkpointing within a module's hooks) its unit's backward
   begins, which holds it, and it is attached for the one call.
4. Elsewhere its unit is fetched for the one call. ``detach()`` and ``.data`` return an alias
   (alias.py) that does the same at each use. Other results that would share memory with the slab
   are refused, since the slab may leave at any time; ``clone()`` is always possible.
Where several devices share a model, 2 and 3 bring the parameters to where the other operands are.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from offload.errors import SpilledTensorError
from offload.tiers import places
from offload.tiers.alias import SpilledAlias
from offload.tiers.context import RuntimeContext
from offload.tiers.unit import (
    OWNER,
    OffloadedParam,
    RowsParameter,
    SpilledParameter,
    SpreadParameter,
    Unit,
    owner_of,
)

_T = torch.Tensor


def _attribute(name: str) -> list[Any]:
    """The getter and setter functions of a tensor attribute, as torch functions see them."""
    descriptor = getattr(_T, name)
    return [getattr(descriptor, "__get__", None), getattr(descriptor, "__set__", None)]


_ABOUT = {
    function
    for name in (
        *("shape", "dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf"),
        *("names", "ndim", "itemsize", "nbytes", "is_sparse", "is_cuda", "is_cpu", "is_meta"),
        *("is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_xpu", "_version"),
        *("_backward_hooks", "output_nr", "retains_grad", "volatile", "name"),
    )
    if hasattr(_T, name)
    for function in _attribute(name)
} | {
    getattr(_T, name)
    for name in (
        *("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex"),
        *("is_signed", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook"),
        *("__len__", "__hash__", "is_shared", "get_device", "_is_view", "is_inference"),
        *("has_names", "is_conj", "is_neg"),
    )
    if hasattr(_T, name)
}
_ABOUT |= {
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_conj,
    torch.is_same_size,
}

_NEEDS_MEMORY = {
    getattr(_T, name)
    for name in (
        *("data_ptr", "storage", "untyped_storage", "_typed_storage", "share_memory_"),
        "__dlpack__",
    )
}
# These are new wrappers at each access: compare by ==.
_SET_DATA = _T.data.__set__  # type: ignore[attr-defined]
_GET_DATA = _T.data.__get__  # type: ignore[attr-defined]
_ALIASES = (_T.detach, torch.detach, _GET_DATA)
_NEED_ALL_ROWS = [
    *(_SET_DATA, *_ALIASES, _T.numpy, _T.__array__, _T.tolist, _T.__deepcopy__),
    *(f for f in _NEEDS_MEMORY if f not in (_T.data_ptr, _T.untyped_storage)),
]
"""What keeps or reads the memory, with no operator that would tell."""
_WANTS_GRAD = {_T.requires_grad_, _T.requires_grad.__set__}  # type: ignore[attr-defined]


def touch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the torch function `func` on arguments among which are spilled parameters.

    Raises:
        SpilledTensorError: the result would be memory of the slab, or `func` replaces the data.
    """
    if func in _ABOUT:
        if func in _WANTS_GRAD and isinstance(args[0], SpilledAlias):
            raise SpilledTensorError(
                "the detached values of a spilled parameter cannot require a gradient of their "
                "own: take .detach().clone().requires_grad_()"
            )
        return _plainly(func, args, kwargs)
    if func is _T.type and len(args) == 1 and not kwargs:
        return _plainly(func, args, kwargs)
    if func is torch.autograd.grad:
        return func(*tree_map(_edge, args), **tree_map(_edge, kwargs))
    values = [v for v in tree_iter((args, kwargs)) if isinstance(v, _SPILLED)]
    params = list(dict.fromkeys(owner for v in values if (owner := _owner(v)) is not None))
    if not params:  # aliases of a model that was unwrapped, or attached since (by torch.compile)
        return func(*tree_map(_real, args), **tree_map(_real, kwargs))
    first = params[0]
    if _has_rows(params, values) and not any(func == whole for whole in _NEED_ALL_ROWS):
        return _plainly(func, args, kwargs)
    if all(type(v) is SpreadParameter for v in values):
        return _plainly(func, *_gathered(func, args, kwargs))
    if func is _T.stride:
        return _of_strides(first, args, kwargs)
    if func is _T.is_contiguous:
        return torch.empty_strided(first.shape, first.stride, device="meta").is_contiguous()
    with first.context.lock:
        return _fetched(first.context, func, params, args, kwargs)


_SPILLED = (SpilledParameter, SpilledAlias)


def _owner(value: SpilledParameter | SpilledAlias) -> OffloadedParam | None:
    if isinstance(value, SpilledAlias):
        return value.owner
    owner = owner_of(value)
    if owner is None:
        raise SpilledTensorError("a spilled parameter without an owner (internal error)")
    return owner


def _real(value: Any) -> Any:
    """The attached parameter's memory in place of its alias."""
    return value._param.detach() if isinstance(value, SpilledAlias) else value


def _has_rows(params: list[OffloadedParam], values: list[Any]) -> bool:
    """Whether this thread's forward has rows of all of `params`, and sees which are read."""
    return all(type(v) is RowsParameter for v in values) and all(
        param.context.scopes.row_use(param.unit) is not None for param in params
    )


def _plainly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _edge(value: Any) -> Any:
    """What stands for a parameter in ``torch.autograd.grad`` without its bytes."""
    if not isinstance(value, SpilledParameter):
        return value
    return _plainly(torch.autograd.graph.get_gradient_edge, (value,), {})


def _of_strides(param: OffloadedParam, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    meta = torch.empty_strided(param.shape, param.stride, device="meta")
    return meta.stride(*args[1:], **kwargs)


def _fetched(
    context: RuntimeContext,
    func: Any,
    params: list[OffloadedParam],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    units = list({param.unit: None for param in params})
    if context.scopes.mine:
        context.join_scope(units)
        return _run(context, func, args, kwargs)
    if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
        for unit in units:
            context.gradients.begin_backward(unit)
        with _all_held(context, units), context.saved_hooks():
            return _run(context, func, args, kwargs)
    names = ", ".join(param.name for param in params)
    stays = all(context.pointers.stays(unit) for unit in units)
    if func == _SET_DATA or (func in _NEEDS_MEMORY and not stays):
        raise _refused(func, names)
    by_value = context.reading_out and not params[0].is_narrowed  # of that one the master is read
    if any(func == alias for alias in _ALIASES) and not (stays or by_value):
        return SpilledAlias.of(params[0])
    with _all_held(context, units), context.saved_hooks():
        result = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        if stays:
            return result
        if isinstance(result, numpy.ndarray):
            return _read_only_copy(result)
        whole = {
            param.param.data_ptr(): v for v in tree_iter((args, kwargs)) if (param := _alias_of(v))
        }
        return tree_map(lambda value: _own_memory(context, func, names, value, whole), result)


def _run(context: RuntimeContext, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func` on attached parameters: with several devices, where the other operands are."""
    args, kwargs = tree_map(_real, args), tree_map(_real, kwargs)
    if len(context.tiers) > 1:
        args, kwargs = _gathered(func, args, kwargs)
    return func(*args, **kwargs)


def _gathered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Bring parameters to the device of the first operand that is none, or of the first of all.

    So code between modules goes on where its activations are. Gradients flow back. An operation in
    place needs the parameter itself: it is given the other operands there.
    """
    operands = [v for v in tree_iter((args, kwargs)) if isinstance(v, torch.Tensor)]
    others = [v for v in operands if not hasattr(v, OWNER) and v.dim() > 0]
    name = getattr(func, "__name__", "")
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    with torch._C.DisableTorchFunctionSubclass():
        place = places.place_of((operands if in_place else others or operands)[0])

    def bring(value: torch.Tensor) -> torch.Tensor:
        if hasattr(value, OWNER) or (in_place and value.dim() > 0):
            with torch._C.DisableTorchFunctionSubclass():
                return places.moved(value, place)
        return value

    gathered: tuple[Any, Any] = tree_map_only(torch.Tensor, bring, (args, kwargs))
    return gathered


def _alias_of(value: Any) -> OffloadedParam | None:
    return value.owner if isinstance(value, SpilledAlias) else None


def _read_only_copy(array: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Of an array over the slab's memory; writing to it raises, rather than be lost."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


class _all_held:  # noqa: N801  (a context manager, used as a function)
    """Hold several units for one call."""

    def __init__(self, context: RuntimeContext, units: list[Unit]) -> None:
        self._managers = [context.held(unit) for unit in units]

    def __enter__(self) -> None:
        for manager in self._managers:
            manager.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for manager in reversed(self._managers):
            manager.__exit__(*exc)


def _own_memory(
    context: RuntimeContext, func: Any, names: str, value: Any, whole: dict[int, SpilledAlias]
) -> Any:
    """Return `value` if it has memory of its own; refuse, or copy while reading out, if not.

    `whole` are the aliases that `func` was given, by the address of their memory: one that is
    returned, as by an operation in place, stays an alias.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return value
    if value.untyped_storage().data_ptr() not in context.pointers.by_address:
        return value
    if context.reading_out:  # of a device: all of the model need not fit there
        return value.detach().to("cpu", copy=True)
    alias = whole.get(value.data_ptr())
    if alias is not None and value.shape == alias.shape and value.stride() == alias.stride():
        return alias
    raise _refused(func, names)


def _refused(func: Any, names: str) -> SpilledTensorError:
    what = getattr(func, "__name__", str(func))
    return SpilledTensorError(
        f"{what} on {names}: the parameter is spilled, and this would return or replace memory "
        "that is given up again at once; read a copy with .clone(), or change the parameter in "
        "place under torch.no_grad()"
    )
