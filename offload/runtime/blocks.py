"""Blocks: the repeated parts of a model, which are recomputed or not as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def find_blocks(model: nn.Module, names: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """Return the blocks of `model`, with their qualified names, in the order of its modules.

    They are the modules in `names`, or with None the children of outermost ModuleLists and
    Sequentials. Of these only modules with children of their own: recomputing a single layer saves
    nothing, since its input must be kept instead. The model itself is never a block.
    """
    modules = dict(model.named_modules())
    roots = _children(model) if names is None else [n for n in modules if n in set(names)]
    return [(name, modules[name]) for name in roots if name and _is_block(modules[name])]


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not isinstance(module, torch.jit.ScriptModule)


def _children(model: nn.Module) -> list[str]:
    found: list[str] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            if child in seen:
                continue
            seen.add(child)
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(module, nn.ModuleList | nn.Sequential):
                found.append(path)
                seen.update(child.modules())
            else:
                visit(path, child)

    visit("", model)
    return found
