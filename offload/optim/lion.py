"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023)."""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.aten_rounding import aten_rounding
from offload.optim.base import Group, OffloadOptimizer, Params
from offload.policy import Policy
from offload.tiers.state_layout import StateFormat


class Lion(OffloadOptimizer):
    """Lion for wrapped and for plain models on the CPU. torch has no Lion: this is the paper's.

    Each step of a parameter p with the gradient g and the state m (``exp_avg``)::

        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    The lr should be 3 to 10 times smaller, the weight decay as much larger, than AdamW's. See
    OffloadOptimizer for what else it can do; with a narrow ``state_format`` it keeps a "step" too,
    on which stochastic rounding depends.

    Args:
        params: as for any ``torch.optim.Optimizer``.
        lr: not negative.
        betas: 0 to 1; of the update, and of the state.
        weight_decay: decoupled, not negative.
        maximize: ascend instead.
        foreach, fused: accepted; there is one implementation.
        state_format, seed, policy, step_in_backward: see OffloadOptimizer.

    Raises:
        UnsupportedError: a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    NAMES = ("exp_avg",)

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_format: StateFormat = "float32",
        seed: int = 0,
        policy: Policy | None = None,
        step_in_backward: bool = False,
    ) -> None:
        """Check the arguments; state is made at the first step."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
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

    def check_group(self, group: Group) -> None:
        """Raise ValueError for a hyperparameter out of range, worded as torch's."""
        super().check_group(group)
        if isinstance(group["lr"], torch.Tensor) and group["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not group["lr"] >= 0.0:
            raise ValueError(f"Invalid learning rate: {group['lr']}")
        for index, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")

    def names(self, group: Group) -> tuple[str, ...]:
        """Return the average."""
        return self.NAMES

    def hyper(self, group: Group, step: float, first: bool) -> _native.UpdateHyper:
        """Return the hyperparameters of one step."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return _native.UpdateHyper(
            "lion",
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            step=step,
            maximize=group["maximize"],
            rounding=aten_rounding(),
        )

    def everything(self) -> _native.UpdateHyper:
        """Return hyperparameters with all states."""
        return _native.UpdateHyper("lion", rounding=aten_rounding())
