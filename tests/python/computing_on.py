"""Models on a device, in tests that know of the CPU alone.

They compare a wrapped model with a plain one. On CUDA the wrapped one computes on the GPU and is
updated on the CPU, so the plain one has to do the same.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from offload.planner import UnitSpec, smallest_device_budget
from offload.policy import Policy
from offload.runtime.resources import Resources
from offload.tiers.compute_device import CPU
from offload.tiers.unit import owner_of


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def has_cuda() -> bool:
    return torch.cuda.is_available()


@contextmanager
def on_device(device: str, patch: pytest.MonkeyPatch, update: str = "cpu") -> Iterator[None]:
    """Have models compute on `device` within a block: ``Policy.device``, whatever a test gives.

    Several are separated by commas. Wrapped ones have room on each for three of their largest
    units or, with another ``Policy.update`` than "cpu", as little as they can.
    """
    plan, names = Resources.__init__, device.split(",")

    def plan_with_device(self: Resources, policy: Policy, specs: Sequence[UnitSpec]) -> None:
        flat = [unit.param_bytes + unit.grad_bytes for unit in specs if not unit.nested]
        nested = [unit.param_bytes + unit.grad_bytes for unit in specs if unit.nested]
        nbytes = 3 * max(flat, default=0) + sum(nested)
        if update != "cpu":
            nbytes = smallest_device_budget(specs, updates=True)
        budget = dataclasses.replace(policy.budget, device=nbytes)
        plan(self, dataclasses.replace(policy, device=names, budget=budget, update=update), specs)

    patch.setattr(Resources, "__init__", plan_with_device)
    where = [torch.device(n if ":" in n else f"{n}:0") if is_cuda(n) else CPU for n in names]
    patch.setattr("offload.runtime.wrapped.torch_devices", lambda policy: tuple(where))
    if not is_cuda(device):
        yield
        return
    with compared_on(where[0], patch):
        yield


@contextmanager
def compared_on(device: torch.device, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have plain models do on `device` what wrapped ones do there, the same bits each time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    handle = compute_on(device, patch)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implem")
            yield
    finally:
        handle.remove()
        torch.use_deterministic_algorithms(False)


def compute_on(device: torch.device, patch: pytest.MonkeyPatch) -> RemovableHandle:
    """Have all models compute on `device` until `patch` is undone and the handle removed.

    1. a call of a plain module moves it there. Of any module, the tensors among the arguments are
       moved there, and those among the results to the CPU, where the test goes on with them.
    2. an optimizer's step moves plain parameters, with their gradients, to the CPU before.
    3. the norm of gradients is taken of one after the other, as of those of wrapped models.
    4. torch.equal() compares tensors wherever they are.
    """
    patch.setattr(nn.Module, "__call__", _called_on(device, nn.Module.__call__))
    clip = torch.nn.utils.clip_grad_norm_

    def clip_one_by_one(*args: Any, **kwargs: Any) -> torch.Tensor:
        return clip(*args, **{"foreach": False, **kwargs})

    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_one_by_one)
    equal = torch.equal
    patch.setattr(torch, "equal", lambda a, b: equal(a.cpu(), b.cpu()))
    return register_optimizer_step_pre_hook(_to_cpu)


def _called_on(device: torch.device, call: Callable[..., Any]) -> Callable[..., Any]:
    inside = threading.local()

    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "a_call", False) or torch._C._current_graph_task_id() != -1:
            return call(self, *args, **kwargs)
        if all(owner_of(param) is None for param in self.parameters()):
            self.to(device)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
        inside.a_call = True
        try:
            result = call(self, *args, **kwargs)
        finally:
            inside.a_call = False
        return tree_map_only(torch.Tensor, lambda t: t.to("cpu"), result)

    return moved


def _to_cpu(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if owner_of(param) is not None:
                continue
            grad, param.grad = param.grad, None
            param.data = param.data.to("cpu")
            param.grad = None if grad is None else grad.to("cpu")
