"""Adafactor (Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory", 2018)."""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.attached import AttachedUnit, gradient_as_tensor
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.optim.one_parameter import ClassStep
from offload.optim.update import Update
from offload.policy import Policy
from offload.tiers.state_layout import MASTER, StateArray
from offload.tiers.unit import OffloadedParam


class Adafactor(OffloadOptimizer):
    """Drop-in ``torch.optim.Adafactor`` for wrapped and for plain models on the CPU.

    A step depends on rows, columns and norms of a whole parameter, so there is no native rule: it
    is torch's own, on one parameter after the other, with the unit of a wrapped model in memory for
    it. Its statistics are small and stay in ordinary memory, outside of any budget; the fp32 copy
    of a 16-bit parameter, on which torch's step runs, lives where other optimizers' states do.

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
        step = ClassStep(torch.optim.Adafactor, self)
        with AttachedUnit() as attached:
            for update in self._in_order(updates):
                attached.use(update.kept.owner)
                with gradient_as_tensor(update.kept.param, update.kept.owner):
                    self._take(update, step)

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

    def _take(self, update: Update, step: ClassStep) -> None:
        kept, param = update.kept, update.kept.param
        group = {**self.param_groups[update.group], "foreach": False}
        group.pop("param_names", None)
        state = {k: v for k, v in self.state.get(param, {}).items() if k != MASTER}
        master = update.layout.master
        if master is None:
            stepped = param
        else:
            stepped = kept.shaped(kept.read(master))
            if param.grad is not None:
                stepped.grad = param.grad.float()
        one = step.on({**group, "params": [stepped]}, 0, state or None)
        one.run()
        self.state[param].update(one.state)
        if master is not None:
            self._publish(update, master, stepped)
        torch.autograd.graph.increment_version(param)

    def _publish(self, update: Update, master: StateArray, stepped: torch.Tensor) -> None:
        kept = update.kept
        kept.begin(master, kept.flat(stepped.detach()))
        kept.param.copy_(stepped)
