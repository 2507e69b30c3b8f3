"""RMSprop (Tieleman & Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012)."""

from __future__ import annotations

import torch

from offload import _native
from offload.errors import UnsupportedError
from offload.optim.aten_rounding import aten_rounding
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.policy import Policy
from offload.tiers.state_layout import StateFormat


class RMSprop(OffloadOptimizer):
    """Drop-in ``torch.optim.RMSprop`` for wrapped and for plain models on the CPU.

    In fp32 the results are the bits of ``torch.optim.RMSprop(foreach=False)``; see OffloadOptimizer
    for what else it can do.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr, alpha, eps, weight_decay, momentum, maximize: as in torch.
        foreach: accepted; there is one implementation.
        centered: as in torch; refused with a narrow state_format.
        capturable, differentiable: refused when true.
        state_format, seed, policy, step_in_backward: see OffloadOptimizer.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    TORCH = torch.optim.RMSprop
    NAMES = ("square_avg", "momentum_buffer", "grad_avg")

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; state is made at the first step."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(
            params,
            defaults,
            state_format=state_format,
            seed=seed,
            policy=policy,
            step_in_backward=step_in_backward,
        )

    def refuse_options(self, group: Group) -> None:
        """Raise UnsupportedError also where the variance could become negative, and its root NaN.

        Centering subtracts the square of one average from another, which exceeds it by little where
        gradients hardly change: less than a narrow format rounds either by.
        """
        super().refuse_options(group)
        if group.get("centered") and self.state_format != "float32":
            raise UnsupportedError(
                f"{self._name} does not support centered=True with "
                f"state_format={self.state_format!r}: rounded averages can give a negative "
                "variance; use state_format='float32', or centered=False"
            )

    def names(self, group: Group) -> tuple[str, ...]:
        """Return the average of squares, and what momentum and centering need."""
        square_avg, momentum_buffer, grad_avg = self.NAMES
        momentum = (momentum_buffer,) if group["momentum"] > 0 else ()
        centered = (grad_avg,) if group["centered"] else ()
        return (square_avg, *momentum, *centered)

    def hyper(self, group: Group, step: float, first: bool) -> _native.UpdateHyper:
        """Return the hyperparameters of one step."""
        return _native.UpdateHyper(
            "rmsprop",
            lr=float(group["lr"]),
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            step=step,
            maximize=group["maximize"],
            centered=group["centered"],
            rounding=aten_rounding(),
        )

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with all states."""
        return _native.UpdateHyper("rmsprop", momentum=0.9, centered=True, rounding=aten_rounding())
