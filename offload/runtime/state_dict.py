"""state_dict() and load_state_dict() of a wrapped model.

Of a narrowed parameter both are about its fp32 master: a checkpoint is that of the model as it was
wrapped, and training goes on from it with the same bits.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.errors import UnsupportedError
from offload.tiers.changed_values import masters_of
from offload.tiers.context import RuntimeContext
from offload.tiers.masters import copy_values, replace_master
from offload.tiers.unit import owner_of


def add_state_dict_hooks(model: nn.Module, context: RuntimeContext) -> list[RemovableHandle]:
    """Make ``state_dict`` hold current values: copies of what is spilled, aliases of the rest.

    Of narrowed parameters copies of the masters, but for ``keep_vars``: the parameters themselves.
    What is tied is one tensor: savers tell by its memory that it is to be stored once.
    """
    handles: list[RemovableHandle] = []
    first: dict[nn.Parameter, tuple[str, weakref.ref[torch.Tensor]]] = {}

    def begin(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        context.reading_out = True

    def end(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
        context.reading_out = False
        for name, param in module.named_parameters(recurse=False):
            key = prefix + name
            if key not in state_dict:
                continue
            first_key, value = first.get(param, (key, None))
            earlier = None if value is None else value()
            if earlier is not None and key != first_key and state_dict.get(first_key) is earlier:
                state_dict[key] = earlier
                continue
            owner = owner_of(param)
            if owner is not None and owner.is_narrowed and state_dict[key] is not param:
                with context.lock:
                    (state_dict[key],) = masters_of(context, [owner])
            first[param] = key, weakref.ref(state_dict[key])

    def before_load(
        module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("assign_to_params_buffers", False):
            raise UnsupportedError(
                "load_state_dict(assign=True) would replace the parameters of an offloaded model; "
                "use assign=False"
            )
        for name, param in module.named_parameters(recurse=False):
            owner, value = owner_of(param), state_dict.get(prefix + name)
            if owner is None or not owner.is_narrowed or not isinstance(value, torch.Tensor):
                continue
            if value.shape == owner.shape or (value.shape, owner.shape) == ((1,), ()):
                state_dict[prefix + name] = wide = value.detach().to("cpu", torch.float32)
                with context.lock:
                    replace_master(context, owner, partial(copy_values, wide.view(owner.shape)))

    for module in model.modules():  # torch does not type these three
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_state_dict_pre_hook(begin))  # type: ignore[no-untyped-call]
            handles.append(module._register_state_dict_hook(end))  # type: ignore[no-untyped-call]
            handles.append(module.register_load_state_dict_pre_hook(before_load))  # type: ignore[no-untyped-call]
    return handles
