"""OffloadOptimizer: all that the native update rules have in common.

Protocol of a step:
 1. collect: the parameters with gradients; what cannot be updated is refused.
 2. begin: what of their state does not exist yet is made. Whatever can fail for want of memory,
    disk space or support has failed by now, and nothing was changed.
 3. count: each parameter's step.
 4. update: hyperparameters are read now, so that a scheduler may change any of them. What is in
    ordinary memory is updated at once; units of wrapped models are handed to their pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, overload

import torch
from torch.optim import Optimizer

from offload import _native
from offload.errors import OffloadError, UnsupportedError
from offload.optim.amp_scaling import Scaling
from offload.optim.backward_step import BackwardSteps, end_backward_step, spend
from offload.optim.begin_state import begin_state, provide_state
from offload.optim.checks import describe, is_ready, is_supported, refused_gradient
from offload.optim.memory_update import MemoryUpdater
from offload.optim.param_state import (
    MemoryState,
    ParamState,
    ResidentState,
    SlabState,
    UnitState,
)
from offload.optim.resident_update import update_resident
from offload.optim.slab_update import update_slabs
from offload.optim.state_dict import loading, packing, scalar_dtype
from offload.optim.unit_update import update_units
from offload.optim.update import Update
from offload.policy import Policy
from offload.tiers.spent_grad import SpentGrad
from offload.tiers.state_home import StateHome, page_bytes
from offload.tiers.state_layout import PARAM_DTYPES, STATE_FORMATS, StateFormat, StateLayout
from offload.tiers.unit import owner_of

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
Group = dict[str, Any]


class OffloadOptimizer(Optimizer):
    """Base of the optimizers with a native update rule; a subclass is the rule.

    Attributes:
        TORCH: the class of torch that the subclass replaces; it checks hyperparameters.
        NAMES: of all states that the rule can have, as in torch, in the native rule's order.
        BEGINS_AT_ONCE: torch makes the state in the constructor; a state_dict shows it.
        ON_HOST: it updates attached parameters, which must be in host memory.
        keeps_masters: 16-bit parameters are updated through fp32 copies.
        state_format: the format that states are kept in.
        seed: of the stochastic rounding of bfloat16 states.
    """

    TORCH: ClassVar[type[Optimizer] | None] = None
    NAMES: ClassVar[tuple[str, ...]] = ()
    BEGINS_AT_ONCE: ClassVar[bool] = False
    keeps_masters: ClassVar[bool] = True
    ON_HOST: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        defaults: Group,
        *,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; state is made at the first step.

        Args:
            params: as for any ``torch.optim.Optimizer``; dense float32, bfloat16 or float16
                parameters on the CPU.
            defaults: hyperparameters of groups that do not give their own.
            state_format: "float32", "bfloat16" (stochastically rounded) or "int8" (block-wise
                dynamic quantization, Dettmers et al. 2022).
            seed: 0 to 2**64 - 1.
            policy: for a plain model, where state lives; None: in memory.
            step_in_backward: apply each gradient inside the backward, as soon as it is complete,
                and keep none: for loops that neither accumulate nor clip nor scale gradients.
                ``step()`` then ends the step.

        Raises:
            UnsupportedError: an option or a parameter that cannot be handled.
            ValueError: a hyperparameter out of range.
        """
        if state_format not in STATE_FORMATS:
            raise ValueError(f"state_format={state_format!r}: expected one of {STATE_FORMATS}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed!r}: expected an integer from 0 to 2**64 - 1")
        self.state_format: StateFormat = state_format
        self.seed = seed
        self._policy = policy
        self._backward: BackwardSteps | None = None
        if step_in_backward:
            self._backward = BackwardSteps(self._apply, self._name)
        self._start()
        super().__init__(params, defaults)

    def _start(self) -> None:
        """Set what a copy does not share with the original."""
        self._kept: dict[torch.Tensor, ParamState] = {}
        self._layouts: dict[tuple[tuple[str, ...], torch.dtype], StateLayout] = {}
        self._memory = MemoryUpdater()
        self._home: StateHome | None = None

    # -- what a rule says -----------------------------------------------------------------------

    def names(self, group: Group) -> tuple[str, ...]:
        """Return which of NAMES the rule needs with the options of `group`."""
        raise NotImplementedError

    def hyper(self, group: Group, step: float, first: bool) -> _native.UpdateHyper:
        """Return the native hyperparameters.

        Args:
            group: its hyperparameters are read now.
            step: counted from 1.
            first: the states were begun in this step.
        """
        raise NotImplementedError

    def initial(self, group: Group, name: str) -> float:
        """Return what state `name` starts with."""
        return 0.0

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with which the native rule has all of NAMES."""
        raise NotImplementedError

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """See Scaling: with it, ``GradScaler.step`` leaves the unscaling to step()."""
        return any(p.dtype is torch.float16 for group in self.param_groups for p in group["params"])

    @property
    def counts_steps(self) -> bool:
        """Whether ``optimizer.state`` has a "step"."""
        return True

    # -- groups ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            UnsupportedError, ValueError: as the constructor; nothing was added.
        """
        if isinstance(param_group, dict):
            self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not is_supported(param):
                self.param_groups.pop()
                raise UnsupportedError(
                    f"{self._name} updates dense float32, bfloat16 and float16 parameters on the "
                    f"CPU; got {describe(param)}"
                )
        if self._backward is not None:
            self._backward.watch(self.param_groups[-1]["params"])

    def check_group(self, group: Group) -> None:
        """Raise what the torch class raises for the hyperparameters of `group`, and refuse more."""
        self.refuse_options(group)
        if self.TORCH is None:
            return
        known = inspect.signature(self.TORCH.__init__).parameters
        options = {name: value for name, value in group.items() if name in known}
        self.TORCH(**{**options, "params": [torch.empty(0)]})

    def refuse_options(self, group: Group) -> None:
        """Raise UnsupportedError for an option in `group` that is for other devices or autograd."""
        for option in ("capturable", "differentiable"):
            if group.get(option):
                raise UnsupportedError(f"{self._name} does not support {option}=True")

    @property
    def _name(self) -> str:
        return f"offload.{type(self).__name__}"

    # -- the step -------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; see ``torch.optim.Optimizer.step``.

        For a wrapped model whose policy has ``lazy_step`` the update itself runs in the background,
        with the hyperparameters and gradient factors of now.

        Raises:
            UnsupportedError: a sparse gradient, say; nothing was updated.
            BudgetError, SwapSpaceError: state was to be made, and there is no room for it; nothing
                was updated.
            OffloadError: an update failed (disk error, say); see its message.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = Scaling.of(self)
        if scaling.skips:
            return loss
        updates = self._collect()
        for update in updates:
            update.unscale = scaling.unscale
        self._update(updates)
        if self._backward is not None:
            end_backward_step(self.param_groups)
        return loss

    @torch.no_grad()
    def _apply(self, params: Sequence[torch.Tensor]) -> None:
        """Take the step of `params`, inside a backward."""
        wanted = set(params)
        updates = self._collect(wanted)
        self._update(updates, at_once=True)
        spend([update.kept for update in updates])

    def _update(self, updates: list[Update], at_once: bool = False) -> None:
        self._begin([update for update in updates if not is_ready(update)])
        self._count(updates)
        self._run(updates, at_once)

    def _slots(self) -> Iterator[tuple[int, int, tuple[str, ...], torch.Tensor]]:
        """Yield each parameter with its number, its group's index and the names of its states."""
        number = -1
        for index, group in enumerate(self.param_groups):
            names = self.names(group)
            for param in group["params"]:
                number += 1
                yield number, index, names, param

    def _collect(self, only: set[torch.Tensor] | None = None) -> list[Update]:
        """Return the updates of all parameters that have a gradient, or of those among `only`."""
        updates = []
        for number, index, names, param in self._slots():
            grad = param.grad
            if grad is None or isinstance(grad, SpentGrad):
                continue
            if only is not None and param not in only:
                continue
            if grad.layout is not torch.strided or grad.dtype is not param.dtype:
                raise refused_gradient(self._name, param, grad)
            kept = self._state_of(param, number)
            if param.device.type != "cpu" and (self.ON_HOST or kept.owner is None):
                whose = "plain" if kept.owner is None else "wrapped"
                raise UnsupportedError(
                    f"{self._name} does not update parameters of {whose} models on {param.device}"
                )
            if isinstance(kept, UnitState):
                kept.run.check(kept.tenant)
            elif kept.owner is not None:  # frozen
                kept.owner.context.gradients.set(kept.owner, grad)  # which is refused
            updates.append(Update(kept, self._layout(names, param.dtype), index, grad))
        return updates

    def _layout(self, names: tuple[str, ...], dtype: torch.dtype) -> StateLayout:
        layout = self._layouts.get((names, dtype))
        if layout is None:
            if dtype not in PARAM_DTYPES:  # changed since it was added, by module.double() say
                raise UnsupportedError(f"{self._name} does not update parameters of {dtype}")
            layout = StateLayout(names, dtype, self.state_format)
            self._layouts[names, dtype] = layout
        return layout

    def _state_of(self, param: torch.Tensor, number: int) -> ParamState:
        """Return where the state of `param` is: that changes when a model is wrapped, say."""
        owner = owner_of(param)
        kept = self._kept.get(param)
        if kept is None or kept.owner is not owner or kept.is_stale(self.state):
            if owner is not None and not owner.trainable:
                kept = MemoryState(param, number, self.state, owner)
            elif owner is None and self._policy is None:
                kept = MemoryState(param, number, self.state)
            elif owner is None:
                kept = SlabState(param, number, self._own_home())
            elif self._policy is None and owner.context.resident:
                kept = ResidentState(owner, number)
            elif self._policy is None:
                kept = UnitState(owner, number)
            else:
                raise UnsupportedError(
                    f"{self._name}(policy=...) is for plain models; {owner.name} is of a wrapped "
                    "one, whose own policy says where its optimizer state lives"
                )
            self._kept[param] = kept
        return kept

    def _own_home(self) -> StateHome:
        """Return where the state of plain parameters lives, made for all that there are now."""
        if self._home is None:
            if self._policy is None:
                raise OffloadError("no policy says where state lives (internal error)")
            total = sum(
                page_bytes(array.nbytes(param.numel()))
                for group in self.param_groups
                for param in group["params"]
                for array in self._layout(self.NAMES, param.dtype).arrays
            )
            self._home = StateHome.of_policy(self._policy, total)
        return self._home

    def _begin(self, updates: list[Update]) -> None:
        """Make the state that `updates` need and that there is not."""
        if updates and self._backward is not None:  # others follow: room is shared out among all
            provide_state(
                [
                    (self._state_of(param, number), self._layout(names, param.dtype))
                    for number, _, names, param in self._slots()
                    if param.requires_grad
                ]
            )
        provide_state([(update.kept, update.layout) for update in updates])
        for update in updates:
            kept = update.kept
            begin_state(self, self.state, kept, update.layout, self.param_groups[update.group])
            if self.counts_steps and "step" not in self.state[kept.param]:
                self.state[kept.param]["step"] = torch.tensor(0.0, dtype=scalar_dtype())

    def _count(self, updates: list[Update]) -> None:
        """Add 1 to each parameter's step."""
        if not self.counts_steps:
            return
        for update in updates:
            update.step = update.kept.count(self.state[update.kept.param]["step"])

    def _run(self, updates: list[Update], at_once: bool) -> None:
        hypers: dict[tuple[int, float, bool], _native.UpdateHyper] = {}
        by_place: dict[type[ParamState], list[Update]] = {}
        for update in updates:
            key = (update.group, update.step, update.kept.fresh)
            if key not in hypers:
                hypers[key] = self.hyper(self.param_groups[key[0]], key[1], key[2])
                hypers[key].unscale = update.unscale
            update.hyper = hypers[key]
            update.kept.fresh = False
            by_place.setdefault(type(update.kept), []).append(update)
        update_units(by_place.get(UnitState, []), self.seed, at_once)
        update_slabs(by_place.get(SlabState, []), self.seed)
        update_resident(by_place.get(ResidentState, []), self.seed, self._memory)
        self._memory.run(by_place.get(MemoryState, []), self.seed)

    # -- state_dict and copies ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format: it can be loaded into the torch class.

        States are fp32 whatever ``state_format`` is; "master" is the fp32 copy of a 16-bit
        parameter, which the torch class ignores. What does not lie in memory is read for it.
        """
        with packing(self, self._state_of, self._kept):
            packed = super().state_dict()
        packed["state"] = {key: dict(value) for key, value in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of the torch class returned.

        Narrow states are encoded again: to the bits that they were, if they were narrow alike.

        Raises:
            UnsupportedError: it is of an optimizer with an option that is refused here.
            ValueError: it does not fit the parameters.
            BudgetError, SwapSpaceError: there is no room for the state.
            Whatever is raised, nothing was loaded.
        """
        with loading(self, self._state_of, self._kept):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy consists of."""
        params = (param for group in self.param_groups for param in group["params"])
        if self._policy is not None or any(owner_of(param) is not None for param in params):
            raise UnsupportedError(
                f"{self._name} keeps state outside of ordinary memory and cannot be copied or "
                "pickled; save its state_dict()"
            )
        if self._backward is not None:
            raise UnsupportedError(
                f"{self._name}(step_in_backward=True) has hooks on its parameters and cannot be "
                "copied or pickled; save its state_dict()"
            )
        return {**super().__getstate__(), "state_format": self.state_format, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied or a loaded state."""
        if "defaults" in state:  # a copy; load_state_dict() gives less
            self._policy = None
            self._backward = None
            self._start()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
