"""Adafactor (Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory", 2018)."""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.adafactor_step import is_native, take_step
from offload.optim.attached import AttachedUnit, gradient_and_factors, multiplied
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.optim.one_parameter import ClassStep
from offload.optim.param_state import MemoryState
from offload.optim.update import Update
from offload.policy import Policy
from offload.tiers.state_layout import MASTER
from offload.tiers.unit import OffloadedParam


class Adafactor(OffloadOptimizer):
    """Drop-in ``torch.optim.Adafactor`` for wrapped and for plain models on the CPU.

    A step depends on rows, columns and norms of a whole parameter, so it is not taken in the
    background: it is done when ``step()`` returns, with the unit of a wrapped model in memory for
    it. The native passes make no tensor of the parameter's size and give torch's bits. Parameters
    or gradients that are not contiguous are summed up in another order: for these, and for fp16
    gradients that a GradScaler scaled, it is torch's own step, temporaries included. The
    statistics are small and stay in ordinary memory, outside of any budget; the fp32 copy of a
    16-bit parameter, on which the step runs, lives where other optimizers' states do.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr, beta2_decay, eps, d, weight_decay, maximize: as in torch.
        foreach: accepted; there is one implementation.
        policy: see OffloadOptimizer.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    TORCH = torch.optim.Adafactor
    ON_HOST = True

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        policy: Policy | None = None,
    ) -> None:
        """Check the arguments; state is made at the first step."""
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, policy=policy)

    @property
    def counts_steps(self) -> bool:
        """Whether the steps are counted here: torch's step does it."""
        return False

    def names(self, group: Group) -> tuple[str, ...]:
        """Return none: the native core has nothing to do with the state."""
        return ()

    def everything(self) -> _native.UpdateHyper:
        """Return what no state needs."""
        raise NotImplementedError

    def _run(self, updates: list[Update], at_once: bool) -> None:
        with AttachedUnit() as attached:
            for update in self._in_order(updates):
                attached.use(update.kept.owner)
                self._take(update)

    def _in_order(self, updates: list[Update]) -> list[Update]:
        """Plain parameters, then unit by unit, each when no update of it is in flight."""
        owners: dict[OffloadedParam, Update] = {}
        order = []
        for update in updates:
            if update.kept.owner is None:
                order.append(update)
            else:
                owners[update.kept.owner] = update
        for context in dict.fromkeys(owner.context for owner in owners):
            units = list(dict.fromkeys(o.unit for o in owners if o.context is context))
            for unit in context.prefetcher.in_order_of_use(units):
                order += [owners[param] for param in unit.params if param in owners]
        return order

    def _take(self, update: Update) -> None:
        kept, param = update.kept, update.kept.param
        master = update.layout.master
        in_place = isinstance(kept, MemoryState)
        stepped = param.detach()
        if master is not None:
            stepped = kept.tensor(master) if in_place else kept.shaped(kept.read(master))
        with gradient_and_factors(param, kept.owner) as (grad, factors):
            if update.unscale != 1.0:
                grad = multiplied(grad, factors).to(stepped.dtype) * update.unscale
                self._take_torch_step(update, stepped, grad)
            elif is_native(param, grad) and stepped.is_contiguous():
                narrow = None if master is None else param
                group, state = self.param_groups[update.group], self.state[param]
                take_step(group, state, stepped, grad, factors, narrow, update.layout.format)
            else:
                self._take_torch_step(update, stepped, multiplied(grad, factors))
        if master is not None and not in_place:
            kept.begin(master, kept.flat(stepped))
        torch.autograd.graph.increment_version(param)
        if master is not None and kept.owner is not None:
            kept.owner.context.pointers.note_update(kept.owner.unit)

    def _take_torch_step(self, update: Update, stepped: torch.Tensor, grad: torch.Tensor) -> None:
        """Take torch's own step on `stepped`, the parameter or its master."""
        param = update.kept.param
        group = {**self.param_groups[update.group], "foreach": False}
        group.pop("param_names", None)
        state = {k: v for k, v in self.state.get(param, {}).items() if k != MASTER}
        stepped.grad = grad.to(stepped.dtype)
        step = ClassStep(torch.optim.Adafactor, self)
        step.attributes.update(grad_scale=None, found_inf=None)  # done, as torch's asks for
        one = step.on({**group, "params": [stepped]}, 0, state or None)
        one.run()
        self.state[param].update(one.state)
        stepped.grad = None
        if stepped.dtype is not param.dtype:
            param.copy_(stepped)
