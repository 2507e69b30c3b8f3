"""The functions a user calls on a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from os import PathLike, fspath
from pathlib import Path
from typing import Literal, TypeVar

from torch import nn

from offload.checkpoint import weights
from offload.checkpoint.weights import IncompatibleKeys
from offload.errors import PolicyError
from offload.policy import Policy
from offload.report import Report
from offload.runtime import deferred
from offload.runtime.materialize import Materialized
from offload.runtime.wrapped import ATTRIBUTE, WrappedModel, wrapped
from offload.trace import Phase

M = TypeVar("M", bound=nn.Module)


def deferred_init(swap_dir: str | PathLike[str] | None = None) -> AbstractContextManager[None]:
    """Build models within a block without their parameters ever being in RAM all at once.

    Write ``with offload.deferred_init(): model = AnyModule(...)``; ``offload.wrap(model, policy)``
    then moves it unit by unit to where the policy wants it. Parameters and generator are the same
    bits as without the block. Until the model is wrapped, tensors of more than 64 KiB that were
    made in the block lie in an unnamed file and are paged in as they are used: the model works,
    slowly. ``materialize(model)`` brings them to ordinary memory.

    Args:
        swap_dir: where the file is, on a disk with room for the parameters; its space is given back
            as they are moved or freed. None: /var/tmp.

    Raises:
        PolicyError: no directory was given, and /var/tmp is in memory.
        SwapIOError: the directory cannot be used.
        SwapSpaceError: within the block, when the disk is full.
    """
    return deferred.deferred_init(None if swap_dir is None else fspath(swap_dir))


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

    With ``Policy(param_dtype=...)`` they are fp32 again: parameters are their masters.
    Optimizer state of ``offload.AdamW`` does not survive: take ``optimizer.state_dict()`` before.

    Raises:
        OffloadError: the model is not wrapped, or an update that was pending failed.
    """
    wrapped(model).unwrap()
    del model.__dict__[ATTRIBUTE]
    return model


def materialize(module: M) -> AbstractContextManager[M]:
    """Have the parameters of a module as real tensors, for reading and writing.

    ``with offload.materialize(model.layers[3]) as layer:`` holds those of a wrapped model, or of a
    part of one, in memory while the block runs: they may be read, changed in place and through
    ``.data``, inside and outside of a forward, and blocks may be nested. When the block ends, after
    an exception too, what was written are the parameters' values, and fp32 copies kept by
    ``offload.optim`` follow. A tensor that shares a parameter's memory is stale after the block.

    What ``deferred_init`` made, and is not wrapped, gets ordinary memory at the call, for good; no
    ``with`` is needed. A module that is in memory anyway is returned as it is.

    Raises:
        BudgetError: what the module has on disk does not fit into memory at once.
        UnsupportedError: when the block ends, if ``.data`` was replaced by something of another
            shape or dtype.
    """
    return Materialized(module)


def load_weights(
    model: nn.Module,
    path: str | PathLike[str],
    strict: bool = True,
    *,
    frozen: Literal["copy", "file"] = "copy",
) -> IncompatibleKeys:
    """Load a safetensors checkpoint, one tensor at a time, straight to where the model lives.

    What ``model.load_state_dict(checkpoint, strict)`` would do, for a wrapped model with no more
    memory than one of its units; tensors of other dtypes are converted by ``copy_``. The model may
    be a part of a wrapped one, deferred, or in ordinary memory too. Of tied weights one name is
    enough. fp32 copies kept by ``offload.optim`` follow.

    Args:
        model: whose ``state_dict()`` has the checkpoint's names.
        path: a .safetensors file, an index of shards (.json), or a folder with
            model.safetensors or model.safetensors.index.json.
        strict: whether names that only the model or only the checkpoint has are an error.
        frozen: "file": frozen parameters that the plan does not keep in memory stay in the
            checkpoint, which has to stay as it is, and are not written to swap: called before
            ``wrap`` for those that are frozen in ``wrap``, or after it. That takes parameters of
            the same dtype, not narrowed, that are contiguous, and a unit all of which is in files;
            others are copied. What is written to is copied to swap then; the checkpoint never
            changes. A file that was changed or cut short is a CorruptionError when it is next read.

    Returns:
        The names that only the model has (``missing_keys``) or only the checkpoint
        (``unexpected_keys``).

    Raises:
        CheckpointError: the file is none, or does not fit: names, shapes, dtypes; nothing was
            changed then. Or it could not be read to its end, when part of it has been loaded.
        PolicyError: `frozen` is neither.
        CorruptionError: with ``frozen="file"``, the file was changed meanwhile.
    """
    return weights.load_weights(model, Path(path), strict, frozen)


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
        device_units=runtime.updated_on_device(),
    )
