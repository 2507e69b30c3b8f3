"""Adam (Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from offload import _native
from offload.optim.aten_rounding import aten_rounding
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.policy import Policy
from offload.tiers.state_layout import StateFormat


class Adam(OffloadOptimizer):
    """Drop-in ``torch.optim.Adam`` for wrapped and for plain models on the CPU.

    In fp32 the results are the bits of ``torch.optim.Adam(foreach=False)``; see OffloadOptimizer
    for what else it can do.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch. As
            tensors they are read at each step; torch rounds what it computes from betas that are
            fp32 tensors to fp32, which is not followed.
        foreach, fused: accepted; there is one implementation.
        capturable, differentiable: refused when true.
        state_format, seed, policy, step_in_backward: see OffloadOptimizer.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    TORCH: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; state is made at the first step."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params,
            defaults,
            state_format=state_format,
            seed=seed,
            policy=policy,
            step_in_backward=step_in_backward,
        )

    def names(self, group: Group) -> tuple[str, ...]:
        """Return both moments, and the maximum with amsgrad."""
        return self.NAMES if group["amsgrad"] else self.NAMES[:2]

    def hyper(self, group: Group, step: float, first: bool) -> _native.UpdateHyper:
        """Return the hyperparameters of one step."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        decoupled = group["decoupled_weight_decay"]
        lr, weight_decay = group["lr"], float(group["weight_decay"])
        if isinstance(lr, torch.Tensor):
            lr, decay = _as_torch_rounds(lr, weight_decay, 1 - beta1**step)
            weight_decay = decay if decoupled else weight_decay
        return _native.UpdateHyper(
            "adamw" if decoupled else "adam",
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=weight_decay,
            step=step,
            maximize=group["maximize"],
            amsgrad=group["amsgrad"],
            rounding=aten_rounding(),
        )

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with all states."""
        return _native.UpdateHyper("adam", amsgrad=True, rounding=aten_rounding())


class AdamW(Adam):
    """Drop-in ``torch.optim.AdamW`` for wrapped and for plain models on the CPU.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019. In fp32 the results are the
    bits of ``torch.optim.AdamW(foreach=False)``; see OffloadOptimizer for what else it can do.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch; see Adam for tensors.
        foreach, fused: accepted; there is one implementation.
        capturable, differentiable: refused when true.
        state_format, seed, policy, step_in_backward: see OffloadOptimizer.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    TORCH: ClassVar[type[torch.optim.Optimizer]] = torch.optim.AdamW

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; state is made at the first step."""
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_format=state_format,
            seed=seed,
            policy=policy,
            step_in_backward=step_in_backward,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied or a loaded state, which may be Adam's."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


def _as_torch_rounds(
    lr: torch.Tensor, weight_decay: float, bias_correction: float
) -> tuple[float, float]:
    """Return the lr and the decoupled weight decay that give torch's bits in fp64.

    With a tensor as lr, torch rounds what it computes from it to that tensor's dtype: the decay
    ``1 - lr * weight_decay`` and the step ``lr / bias_correction``. What is returned leads to the
    same two numbers.
    """
    if lr.dtype is torch.float64:
        return float(lr), weight_decay
    decay = float(1 - lr * weight_decay)
    exact = float(lr / bias_correction) * bias_correction
    return exact, (1 - decay) / exact if exact else 0.0
