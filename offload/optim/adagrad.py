"""Adagrad (Duchi et al., "Adaptive Subgradient Methods for Online Learning", 2011)."""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.aten_rounding import aten_rounding
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.optim.state_dict import scalar_dtype
from offload.policy import Policy
from offload.tiers.state_layout import StateFormat


class Adagrad(OffloadOptimizer):
    """Drop-in ``torch.optim.Adagrad`` for wrapped and for plain models on the CPU.

    In fp32 the results are the bits of ``torch.optim.Adagrad(foreach=False)``; see OffloadOptimizer
    for what else it can do.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in torch.
        foreach, fused: accepted; there is one implementation.
        differentiable: refused when true.
        state_format, seed, policy, step_in_backward: see OffloadOptimizer.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    TORCH = torch.optim.Adagrad
    NAMES = ("sum",)
    BEGINS_AT_ONCE = True

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; all state but the steps is made at the first step."""
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            params,
            defaults,
            state_format=state_format,
            seed=seed,
            policy=policy,
            step_in_backward=step_in_backward,
        )
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["step"] = torch.tensor(0.0, dtype=scalar_dtype())

    def names(self, group: Group) -> tuple[str, ...]:
        """Return the sum."""
        return self.NAMES

    def initial(self, group: Group, name: str) -> float:
        """Return what the sum starts with."""
        return float(group["initial_accumulator_value"])

    def hyper(self, group: Group, step: float, first: bool) -> _native.UpdateHyper:
        """Return the hyperparameters of one step."""
        lr, lr_decay = group["lr"], group["lr_decay"]
        if isinstance(lr, torch.Tensor):  # torch rounds the decayed rate to the tensor's dtype
            lr, lr_decay = float(lr / (1 + (step - 1) * lr_decay)), 0.0
        return _native.UpdateHyper(
            "adagrad",
            lr=lr,
            lr_decay=lr_decay,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            maximize=group["maximize"],
            rounding=aten_rounding(),
        )

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with all states."""
        return _native.UpdateHyper("adagrad", rounding=aten_rounding())
