"""state_dict() and load_state_dict() of the native optimizers, in torch's format.

torch's own two methods do the work, hooks included. Around them, the optimizer's ``state`` is what
torch's class would have: while one is packed, fp32 tensors made for it; while one is loaded,
tensors that torch passes on as they are (it would round them to the parameter's dtype), and that
become state before any other hook sees them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from offload.optim.begin_state import provide_state
from offload.optim.param_state import ParamState
from offload.optim.state_codec import CODES, SCALE, decode, encode
from offload.tiers.state_layout import MASTER, QUANT_BLOCK, StateLayout

if TYPE_CHECKING:
    from offload.optim.base import OffloadOptimizer

StateOf = Callable[[torch.Tensor, int], ParamState]


@contextmanager
def packing(
    optimizer: OffloadOptimizer, state_of: StateOf, kept: Mapping[torch.Tensor, ParamState]
) -> Iterator[None]:
    """Have ``optimizer.state`` as in torch while ``Optimizer.state_dict`` packs it."""
    own = optimizer.state

    def show(_: Any) -> None:
        shown: defaultdict[Any, Any] = defaultdict(dict, own)
        for number, (param, group) in enumerate(_params(optimizer)):
            if param in own or param in kept:
                place = state_of(param, number)
                state = _shown(optimizer, place, group, own.get(param, {}))
                if state or param in own:
                    shown[param] = state
        optimizer.state = shown

    handle = optimizer.register_state_dict_pre_hook(show)
    try:
        yield
    finally:
        handle.remove()
        optimizer.state = own


def _shown(
    rule: OffloadOptimizer, kept: ParamState, group: dict[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of one parameter as torch would have it, in torch's order."""
    shown = {"step": state["step"]} if "step" in state else {}
    narrow: dict[str, torch.Tensor] = {}
    layout = StateLayout(rule.NAMES, kept.param.dtype, rule.state_format)
    for k, array in enumerate(layout.states):
        scales: torch.Tensor | None = None
        if kept.has(array):
            kept_as = kept.tensor(array)
            scales = kept.read(layout.scales[k]) if layout.scales else None
        elif rule.BEGINS_AT_ONCE and array.name in rule.names(group):
            initial = torch.full((kept.param.numel(),), rule.initial(group, array.name))
            codes, scales = encode(rule, array.name, initial)
            kept_as = kept.shaped(codes)
        else:
            continue
        if scales is None:
            shown[array.name] = kept_as.float()
        else:
            shown[array.name] = kept.shaped(decode(rule, array.name, kept.flat(kept_as), scales))
            narrow[array.name + CODES], narrow[array.name + SCALE] = kept_as, scales
    if layout.master is not None and kept.has(layout.master):
        shown[MASTER] = kept.tensor(layout.master)
    shown.update(narrow)
    own = {array.name for array in layout.arrays}
    return {**shown, **{key: value for key, value in state.items() if key not in {*own, *shown}}}


class _Loaded:
    """The state of one parameter, which torch does not look into."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


@contextmanager
def loading(
    optimizer: OffloadOptimizer, state_of: StateOf, kept: Mapping[torch.Tensor, ParamState]
) -> Iterator[None]:
    """Have ``Optimizer.load_state_dict`` load state in the optimizer's format."""

    def check(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        for group in state_dict["param_groups"]:
            optimizer.refuse_options(group)
        loaded = {key: _Loaded(state) for key, state in state_dict["state"].items()}
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = list(_params(optimizer))
        if len(keys) == len(params):  # or else torch raises
            wanted = []
            for number, (key, (param, _group)) in enumerate(zip(keys, params, strict=True)):
                if key in loaded:
                    place = state_of(param, number)
                    wanted.append((place, _layout_of(optimizer, place, loaded[key].state)))
            provide_state(wanted)
        return {**state_dict, "state": loaded}

    def take_over(_: Any) -> None:
        for place in kept.values():
            place.restart()
        for number, (param, _group) in enumerate(_params(optimizer)):
            loaded = optimizer.state.pop(param, None)
            if isinstance(loaded, _Loaded):
                _take_over(optimizer, state_of(param, number), loaded.state)

    before = optimizer.register_load_state_dict_pre_hook(check)
    after = optimizer.register_load_state_dict_post_hook(take_over, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _layout_of(rule: OffloadOptimizer, kept: ParamState, state: Mapping[str, Any]) -> StateLayout:
    """Return the layout for a loaded state; raises ValueError when it does not fit."""
    shape = tuple(kept.param.shape)
    for name in (*rule.NAMES, MASTER):
        value = state.get(name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"loaded state dict has {name} of shape {tuple(value.shape)} for a parameter of "
                f"shape {shape}"
            )
    names = tuple(name for name in rule.NAMES if state.get(name) is not None)
    return StateLayout(names, kept.param.dtype, rule.state_format)


def _take_over(rule: OffloadOptimizer, kept: ParamState, state: Mapping[str, Any]) -> None:
    layout = _layout_of(rule, kept, state)
    own: dict[str, Any] = {}
    for key, value in state.items():
        if key == "step":
            own[key] = _step(value)
        elif key != MASTER and not key.startswith(rule.NAMES):
            own[key] = _own(value)
    if own:
        rule.state[kept.param] = own
    for k, array in enumerate(layout.states):
        values = kept.flat(state[array.name].float())
        codes, scales = _same_codes(rule, kept, array.name, values, state)
        if codes is None:
            codes, scales = encode(rule, array.name, values)
        kept.begin(array, codes)
        if scales is not None:
            kept.begin(layout.scales[k], scales)
    if layout.master is not None and state.get(MASTER) is not None:
        kept.begin(layout.master, kept.flat(state[MASTER].float()))


def _own(value: Any) -> Any:
    """Return a copy of what the native core does not keep; numbers in fp32, as states are."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().to(torch.float32 if value.is_floating_point() else value.dtype)


def _same_codes(
    rule: OffloadOptimizer,
    kept: ParamState,
    name: str,
    values: torch.Tensor,
    state: Mapping[str, Any],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the codes and scales that came with `values`, None where they do not stand for it."""
    codes, scales = state.get(name + CODES), state.get(name + SCALE)
    if rule.state_format != "int8" or codes is None or scales is None:
        return None, None
    if codes.dtype is not torch.uint8 or codes.shape != kept.param.shape:
        return None, None  # they were through a torch optimizer
    codes, scales = kept.flat(codes), scales.float().contiguous()
    if scales.numel() != -(-values.numel() // QUANT_BLOCK):
        return None, None
    same = torch.equal(decode(rule, name, codes, scales), values)
    return (codes, scales) if same else (None, None)


def _step(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to("cpu")
    return torch.tensor(float(value), dtype=scalar_dtype())


def scalar_dtype() -> torch.dtype:
    """Return the dtype of steps, as torch's optimizers choose it."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def _params(optimizer: OffloadOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """The parameters in the order of their numbers, with their groups."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param, group
