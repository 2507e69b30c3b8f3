"""state_dict() and load_state_dict() of a wrapped model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.errors import UnsupportedError
from offload.tiers.context import RuntimeContext


def add_state_dict_hooks(model: nn.Module, context: RuntimeContext) -> list[RemovableHandle]:
    """Make ``state_dict`` hold current values: copies of what is spilled, aliases of the rest."""
    handles: list[RemovableHandle] = []

    def begin(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        context.reading_out = True

    def end(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
        context.reading_out = False

    def before_load(
        module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("assign_to_params_buffers", False):
            raise UnsupportedError(
                "load_state_dict(assign=True) would replace the parameters of an offloaded model; "
                "use assign=False"
            )

    for module in model.modules():  # torch does not type these three
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_state_dict_pre_hook(begin))  # type: ignore[no-untyped-call]
            handles.append(module._register_state_dict_hook(end))  # type: ignore[no-untyped-call]
            handles.append(module.register_load_state_dict_pre_hook(before_load))  # type: ignore[no-untyped-call]
    return handles
