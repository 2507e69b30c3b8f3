"""WrappedModel: what wrap() adds to a model, and unwrap() takes away again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.errors import OffloadError, UnsupportedError
from offload.planner import UnitSpec
from offload.policy import Policy, format_bytes
from offload.runtime.activation_choice import ActivationChoice
from offload.runtime.activations import Activations
from offload.runtime.backward import BackwardHooks
from offload.runtime.block_forward import BlockForward
from offload.runtime.blocks import find_blocks
from offload.runtime.buffers import MovedBuffers
from offload.runtime.deferred import to_memory
from offload.runtime.device_moves import DeviceMoves
from offload.runtime.device_shares import DeviceShares, share_out
from offload.runtime.discover import Discovery, find_units
from offload.runtime.experts import expert_parameters
from offload.runtime.forward import ForwardHooks
from offload.runtime.precision import add_precision_hooks, compute_dtypes
from offload.runtime.resources import Resources
from offload.runtime.saved_tensors import SavedTensorHooks, active_hooks_are_known
from offload.runtime.state_dict import add_state_dict_hooks
from offload.tiers.changed_values import masters_of
from offload.tiers.compute_device import torch_devices
from offload.tiers.device_tier import DeviceTier
from offload.tiers.grad_handle import GradHandle
from offload.tiers.masters import provide_masters
from offload.tiers.spent_grad import SpentGrad
from offload.tiers.unit import OffloadedParam, SpilledParameter, Unit
from offload.tiers.weight_files import origins_of

ATTRIBUTE = "_offload_wrapped"
"""Where a wrapped model keeps its WrappedModel."""

_RECOMPUTE = ("recompute", "auto")
"""Policies of activations that recompute blocks."""


class WrappedModel:
    """The runtime of one wrapped model: its context and its hooks."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        """Plan, reserve, then move the model unit by unit; on failure it is as it was before.

        Raises:
            BudgetError: the smallest host budget that would do is larger than the policy's.
            SwapSpaceError, SwapIOError: the swap directory cannot take what must be spilled.
            UnsupportedError, PolicyError: see find_units and torch_devices.
        """
        devices = torch_devices(policy)
        if policy.activations in _RECOMPUTE and not active_hooks_are_known():
            raise UnsupportedError(
                f'Policy(activations="{policy.activations}") needs torch 2.8 or newer, which '
                'tells the active saved-tensor hooks; use activations="disk"'
            )
        dtypes = compute_dtypes(model, policy.param_dtype)
        found = find_units(model, policy.units, policy.unit_limit, dtypes, devices)
        if not found.units:
            raise UnsupportedError("the model has no parameters: there is nothing to offload")
        self.model = model
        self._handles: list[RemovableHandle] = []
        shares = share_out(model, found, dtypes, len(devices))
        units, specs = _lay_out(found, dtypes, devices, shares)
        resources = Resources(policy, specs)
        self.context = resources.open()
        self._update_note = resources.update_note
        try:
            for unit in units:
                for param in unit.params:
                    param.context = self.context
            provide_masters(self.context, units)
            for unit in units:
                self.context.add_unit(unit)
            self.context.prefetcher.measure_disk()
        except BaseException:
            self._restore()
            raise
        home = self.context.activations
        activations = Activations(model, home) if home is not None else None
        self._saved = SavedTensorHooks(self.context, activations)
        self._backward = BackwardHooks(self.context)
        self.context.gradients.on_backward = self._backward.on_backward
        self._forward = ForwardHooks(self.context, self._saved, self._backward.reset)
        self.context.saved_hooks = self._saved.active
        hooked = self._add_hooks(found, units)
        if shares.count > 1:
            self._handles += DeviceMoves(model, shares, devices, hooked).handles
        to_memory(model.buffers())
        on = {module: devices[number] for module, number in shares.modules.items()}
        self._buffers = MovedBuffers(model, devices[0], on)
        self._blocks: list[BlockForward] = []
        self._choice: ActivationChoice | None = None
        if activations is not None:
            self._treat_activations(activations, resources)

    def _treat_activations(self, activations: Activations, resources: Resources) -> None:
        """Have activations moved, and blocks recomputed as the policy wants."""
        policy = self.context.policy
        if policy.activations in _RECOMPUTE:
            self._blocks = [
                BlockForward(name, module, self._forward, self._saved)
                for name, module in find_blocks(self.model, policy.units)
            ]
        choice = ActivationChoice(
            self.context, activations.home, self._blocks, resources.profiles, resources.link_rates
        )

        def begin_pass() -> None:
            activations.begin_pass()
            choice.begin_pass()

        self._choice = choice
        self._forward.on_pass = begin_pass
        for block in self._blocks:
            block.install()

    def _add_hooks(self, found: Discovery, units: list[Unit]) -> list[nn.Module]:
        """Set all hooks but those that move tensors; return the modules that units are held for."""
        by_param = {param.param: unit for unit in units for param in unit.params}
        uses: dict[nn.Module, list[Unit]] = {self.model: []}
        for unit, source in zip(units, found.units, strict=True):
            uses.setdefault(source.module, []).append(unit)
        for module, params in found.shared:
            for other in dict.fromkeys(by_param[p] for p in params):
                if other not in uses.setdefault(module, []):
                    uses[module].append(other)
        for module in list(self.model.modules()):  # those around a unit that use its weights
            if any(child in uses for child in module.modules()):
                uses.setdefault(module, [])
        if not self.context.resident:
            for module, needed in uses.items():
                self._forward.add(module, needed)
            for unit in units:
                if unit.trainable:
                    with self.context.held(unit):
                        for param in unit.trainable:
                            self._backward.add(param)
        self._handles += self._forward.handles + self._backward.handles
        self._handles += add_state_dict_hooks(self.model, self.context)
        if any(unit.is_narrowed for unit in units):
            self._handles.append(add_precision_hooks(self.model, units))
        for module in self.model.modules():
            module.__dict__["_apply"] = _refuse_conversion(module)
            module.__dict__.update(_REFUSED)
        return list(uses)

    def unwrap(self) -> None:
        """Give the model ordinary tensors again, with current values; gradients become tensors."""
        with self.context.lock:
            self._forward.reset()
            self.context.flush()
            grads = {}
            for unit in self.context.units:
                for param in unit.trainable:
                    grad = param.param.grad
                    if isinstance(grad, GradHandle):
                        grad = grad._state.materialize()
                    if grad is not None and not isinstance(grad, SpentGrad):
                        grads[param] = grad.to(param.given_device, param.given_dtype)
            self._restore()
            self._buffers.back()
            for param, grad in grads.items():
                param.param.grad = grad
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.remove()
        for plain in self.model.parameters():
            if not plain._post_accumulate_grad_hooks:  # ours was the only one, if any
                plain._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        for module in self.model.modules():
            for name in ("_apply", *_REFUSED):
                module.__dict__.pop(name, None)
        self.context.close()

    def _restore(self) -> None:
        """Give every parameter that was taken over a tensor of its own."""
        for unit in self.context.units:
            if unit.is_narrowed:
                copies = masters_of(self.context, unit.params)
            else:
                with self.context.held(unit):
                    self.context.pointers.note_changes(unit)
                    self.context.load(unit)
                    copies = [param.view(unit.param_slab).clone() for param in unit.params]
            for param, copy in zip(unit.params, copies, strict=True):
                if isinstance(param.param, SpilledParameter):
                    param.param.__class__ = nn.Parameter  # type: ignore[assignment]
                if isinstance(param.param.grad, GradHandle | SpentGrad):
                    param.param.grad = None
                param.param.data = copy.to(param.given_device)
                param.let_go()
            unit.attached = False
            self.context.mover.forget(unit.param_slab)

    def counters(self) -> dict[str, Any]:
        """Return cumulative counts of bytes (``*_bytes``) and events since wrap()."""
        context = self.context
        home = context.activations
        movers = [context.mover]
        if home is not None:
            home.tidy()
            movers.append(home.mover)
        memories = {arena: None for m in movers for arena in (m.home, m.ring) if arena is not None}
        arenas = [arena.usage() for arena in memories]
        store = context.store or (home.store if home is not None else None)
        disk = store.stats() if store is not None else {}
        files = context.weight_files.bytes_read if context.weight_files is not None else 0
        update = context.pipeline.stats()
        on_device = context.updates.on_device
        return {
            **_device_counters(context.tiers),
            "arena_budget_bytes": context.plan.budget_bytes,
            "arena_in_use_bytes": sum(usage["in_use"] for usage in arenas),
            "arena_peak_bytes": sum(usage["peak"] for usage in arenas),
            "disk_read_bytes": disk.get("bytes_read", 0) + files,
            "disk_write_bytes": disk.get("bytes_written", 0),
            "disk_busy_seconds": disk.get("busy_seconds", 0.0),
            "update_seconds": update["update_seconds"],
            "updates": update["jobs"],
            "device_updates": on_device.done if on_device is not None else 0,
            "pending": len(context.updates),
            "disk_read_rate": context.prefetcher.read_rate,
            "misses": context.mover.misses,
            "mispredicted": context.prefetcher.trace.mispredicted,
            "uses": context.prefetcher.trace.recorded,
            "activation_saved_bytes": home.saved_bytes if home is not None else 0,
            "activation_left_bytes": home.left_bytes if home is not None else 0,
            "activation_live_bytes": home.live_bytes if home is not None else 0,
            "activation_write_bytes": home.mover.written_bytes if home is not None else 0,
            "activation_read_bytes": home.mover.read_bytes if home is not None else 0,
        }

    def stall_seconds(self) -> dict[str, float]:
        """Return the seconds that the training thread waited, by cause."""
        stalls = dict(self.context.mover.stall_seconds)
        if self.context.activations is not None:
            for why, seconds in self.context.activations.mover.stall_seconds.items():
                stalls["room for activations" if why == "room" else why] = seconds
        return stalls

    def updated_on_device(self) -> frozenset[int]:
        """Return the indices of the units whose updates run on the device, as far as any ran."""
        on_device, jobs = self.context.updates.on_device, self.context.pipeline.stats()["jobs"]
        without_kernels = jobs and (on_device is None or not on_device.done)
        return frozenset() if without_kernels else self.context.device_units

    def _where_updates_ran(self) -> str:
        on_device, jobs = self.context.updates.on_device, self.context.pipeline.stats()["jobs"]
        there, without_room = 0, 0
        if on_device is not None:
            there, without_room = on_device.done, on_device.without_room
        if not jobs:
            return f"updates: all {there} of units ran on the device"
        why = f", {without_room} because there was no room on the device" if without_room else ""
        if not there:
            return f"updates: all {jobs} of units ran on the CPU{why}"
        return f"updates: {there} of units ran on the device, {jobs} on the CPU{why}"

    def notes(self) -> tuple[str, ...]:
        """Return which choices were made, and why."""
        home = self.context.activations
        space = self.context.space or (home.space if home is not None else None)
        notes = space.notes() if space is not None else ()
        slabs = [unit.param_slab for unit in self.context.units]
        in_files = sum(slab.nbytes for slab in slabs if slab.source is not None)
        if in_files:
            notes = (*notes, f"{format_bytes(in_files)} of frozen parameters stay in their files")
        if self.context.weight_files is not None:
            notes = (*notes, *self.context.weight_files.notes)
        if self._update_note:
            notes = (*notes, self._update_note)
        for tier in self.context.tiers:
            if tier.shares_memory:
                notes = (*notes, f"{tier.name} has the host's memory: nothing is copied to it")
                continue
            places = tier.room.places
            found = (
                f"{places.planned} copies to planned places, {places.searched} to where was room"
            )
            notes = (*notes, f"{tier.name}: {found}")
        idle = len(self.context.policy.device_names) - max(1, len(self.context.tiers))
        if idle:
            notes = (*notes, f"of the devices {idle} have nothing: the model has too few blocks")
        if self.context.device_units:
            notes = (*notes, self._where_updates_ran())
        return (*notes, *(self._choice.notes() if self._choice is not None else ()))


def _lay_out(
    found: Discovery,
    dtypes: Mapping[nn.Parameter, torch.dtype],
    devices: Sequence[torch.device],
    shares: DeviceShares,
) -> tuple[list[Unit], list[UnitSpec]]:
    units, specs = [], []
    for index, source in enumerate(found.units):
        number = shares.units[index]
        by_row = expert_parameters(source.module, dtypes)
        own = [
            OffloadedParam(param, name, dtypes[param], devices[number], by_row=param in by_row)
            for name, param in source.own
        ]
        unit = Unit(index, source.name, own)
        unit.spread = index in shares.spread
        units.append(unit)
        frozen_masters = (p.numel * 4 for p in own if p.is_narrowed and not p.trainable and p.numel)
        specs.append(
            UnitSpec(
                unit.name,
                _pages(unit.param_bytes),
                _pages(unit.grad_bytes),
                source.nested,
                unit.params[0].dtype.itemsize,
                tuple(map(_pages, frozen_masters)),
                origins_of(unit) is not None,
                number,
            )
        )
    return units, specs


def _device_counters(tiers: Sequence[DeviceTier]) -> dict[str, Any]:
    """What the arenas of all devices hold and what was copied; with several, of each too."""
    found = [tier.counters() for tier in tiers]
    counters: dict[str, Any] = {key: sum(each[key] for each in found) for key in (found or [{}])[0]}
    if len(tiers) > 1:
        counters["devices"] = [
            {"device": tier.name, **each} for tier, each in zip(tiers, found, strict=True)
        ]
    return counters


def _pages(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096


def _refuse_copy(memo: Any) -> NoReturn:
    raise UnsupportedError("an offloaded model cannot be copied; copy it before offload.wrap()")


def _refuse_pickle(protocol: Any) -> NoReturn:
    raise UnsupportedError(
        "an offloaded model cannot be pickled; save model.state_dict(), or offload.unwrap() it"
    )


_REFUSED = {"__deepcopy__": _refuse_copy, "__reduce_ex__": _refuse_pickle}
"""Put on each module of a wrapped model: a copy would share the original's slabs and hooks."""


def _refuse_conversion(module: nn.Module) -> Callable[..., nn.Module]:
    """Return what replaces ``module._apply``, on which ``to``, ``half``, ``cuda`` are built.

    To the device where it is already, it may be moved.
    """

    def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for dtype, device in {(p.dtype, p.device) for p in module.parameters()}:
            probe = torch.empty(1, dtype=dtype, device=device)
            converted = fn(probe)
            if converted.dtype != probe.dtype or converted.device != probe.device:
                raise UnsupportedError(
                    f"an offloaded model cannot be moved or converted (from {dtype} on {device} to "
                    f"{converted.dtype} on {converted.device}); do it before offload.wrap()"
                )
        return module

    return apply


def wrapped(model: nn.Module) -> WrappedModel:
    """Return the runtime of `model`.

    Raises:
        OffloadError: the model is not wrapped.
    """
    runtime = model.__dict__.get(ATTRIBUTE)
    if not isinstance(runtime, WrappedModel):
        raise OffloadError("this model is not wrapped; call offload.wrap(model, policy) first")
    return runtime
