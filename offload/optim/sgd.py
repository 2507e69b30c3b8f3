"""SGD (Sutskever et al., "On the importance of initialization and momentum", 2013)."""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.aten_rounding import aten_rounding
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.policy import Policy
from offload.tiers.state_layout import StateFormat


class SGD(OffloadOptimizer):
    """Drop-in ``torch.optim.SGD`` for wrapped and for plain models on the CPU.

    In fp32 the results are the bits of ``torch.optim.SGD(foreach=False)``; see OffloadOptimizer for
    what else it can do. With a narrow ``state_format`` it keeps a "step" too, on which stochastic
    rounding depends.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        foreach, fused: accepted; there is one implementation.
        differentiable: refused when true.
        state_format, seed, policy, step_in_backward: see OffloadOptimizer.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    TORCH = torch.optim.SGD
    NAMES = ("momentum_buffer",)

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; state is made at the first step."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
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

    @property
    def counts_steps(self) -> bool:
        """Whether rounding depends on the step; nothing else does."""
        return self.state_format != "float32"

    def names(self, group: Group) -> tuple[str, ...]:
        """Return the momentum buffer, where there is momentum."""
        return self.NAMES if group["momentum"] != 0 else ()

    def hyper(self, group: Group, step: float, first: bool) -> _native.UpdateHyper:
        """Return the hyperparameters of one step."""
        return _native.UpdateHyper(
            "sgd",
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            step=step,
            maximize=group["maximize"],
            nesterov=group["nesterov"],
            first=first,
            rounding=aten_rounding(),
        )

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with all states."""
        return _native.UpdateHyper("sgd", momentum=0.9, rounding=aten_rounding())
