"""The functions a user calls on a model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from offload.errors import PolicyError
from offload.policy import Policy
from offload.report import Report
from offload.runtime.wrapped import ATTRIBUTE, WrappedModel, wrapped
from offload.trace import Phase

M = TypeVar("M", bound=nn.Module)


def wrap(model: M, policy: Policy) -> M:
    """Keep the model's parameters, gradients and optimizer state within `policy`'s budgets.

    The same object is returned; its class, module names and ``state_dict`` keys do not change. Its
    parameters are the same objects too, so an optimizer may be made before or after.

    Args:
        model: any module with dense parameters on the CPU.
        policy: the budgets and places.

    Raises:
        BudgetError: it cannot fit; the message names the smallest host budget that would do.
        SwapSpaceError, SwapIOError: the swap directory is missing, read-only or full.
        PolicyError: the model is wrapped already, or the policy names modules it does not have.
        UnsupportedError: a parameter that cannot be offloaded.
    """
    if ATTRIBUTE in model.__dict__:
        raise PolicyError("the model is wrapped already; offload.unwrap() it first")
    model.__dict__[ATTRIBUTE] = WrappedModel(model, policy)
    return model


def unwrap(model: M) -> M:
    """Undo wrap(): parameters and gradients are ordinary tensors in memory again.

    Optimizer state of ``offload.AdamW`` does not survive: take ``optimizer.state_dict()`` before.

    Raises:
        OffloadError: the model is not wrapped, or an update that was pending failed.
    """
    wrapped(model).unwrap()
    del model.__dict__[ATTRIBUTE]
    return model


def report(model: nn.Module) -> Report:
    """Return what lives where, what moved since wrap(), and what was waited for.

    Raises:
        OffloadError: the model is not wrapped.
    """
    runtime = wrapped(model)
    context = runtime.context
    uses = context.prefetcher.trace.last_training_pass()
    params = sum(p.param.numel() for unit in context.units for p in unit.params)
    return Report(
        plan=context.plan,
        params=params,
        counters=runtime.counters(),
        stall_seconds=runtime.stall_seconds(),
        notes=runtime.notes(),
        uses=None if uses is None else tuple((u.unit, u.phase is Phase.BACKWARD) for u in uses),
        lazy=context.policy.lazy_step,
        state_on_disk=context.state_on_disk(),
    )
