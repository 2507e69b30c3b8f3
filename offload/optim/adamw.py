"""AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.optim import Optimizer

from offload import _native
from offload.errors import OffloadError, UnsupportedError
from offload.optim.aten_rounding import aten_rounding
from offload.optim.dense import update_dense
from offload.tiers.context import RuntimeContext
from offload.tiers.grad_handle import GradHandle
from offload.tiers.unit import OffloadedParam, Unit, owner_of

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class AdamW(Optimizer):
    """Drop-in ``torch.optim.AdamW`` for wrapped and for plain models on the CPU.

    Parameters of a wrapped model have their moments in the model's tiers (host memory or disk, as
    its plan says); parameters of plain models have them in memory. Results are bit-identical to
    ``torch.optim.AdamW(foreach=False)`` in fp32.

    Args:
        params: as for any ``torch.optim.Optimizer``; dense fp32 parameters on the CPU.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        foreach, fused: accepted; there is one implementation.
        amsgrad, capturable, differentiable: refused when true.

    Raises:
        UnsupportedError: an option or a parameter that this optimizer cannot handle.
        ValueError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
            "decoupled_weight_decay": True,
        }
        _refuse_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see ``torch.optim.Optimizer.add_param_group``."""
        group = {**self.defaults, **param_group}
        _refuse_options(group)
        _check_hyperparameters(group)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype is not torch.float32 or param.device.type != "cpu":
                self.param_groups.pop()
                raise UnsupportedError(
                    "offload.AdamW updates float32 parameters on the CPU; got one of "
                    f"{param.dtype} on {param.device} with shape {tuple(param.shape)}"
                )

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
            UnsupportedError: a sparse gradient; nothing was updated.
            OffloadError: an update failed (disk error, say); see its message.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        offloaded: dict[RuntimeContext, dict[Unit, list[_native.UpdateSegment]]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                state["step"] += 1
                hyper = self._hyper(group, state["step"].item())
                owner = owner_of(param)
                if owner is None:
                    update_dense(hyper, param, param.grad, state)
                else:
                    units = offloaded.setdefault(owner.context, {})
                    units.setdefault(owner.unit, []).append(_segment(owner, hyper))
        for context, units in offloaded.items():
            with context.lock:
                for unit in context.prefetcher.in_order_of_use(list(units)):
                    context.begin_update(unit, sorted(units[unit], key=lambda s: s.begin))
                if not context.policy.lazy_step:
                    context.flush()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's format: it can be loaded into ``torch.optim.AdamW``.

        The moments of wrapped models are read to memory for it (8 bytes per parameter).
        """
        full = self._offloaded_params()
        for owner in full:
            state = self.state[owner.param]
            with owner.context.lock:
                state["exp_avg"] = owner.context.moment(owner, 0).clone()
                state["exp_avg_sq"] = owner.context.moment(owner, 1).clone()
        try:
            packed = super().state_dict()
            packed["state"] = {key: dict(value) for key, value in packed["state"].items()}
            return packed
        finally:
            for owner in full:
                del self.state[owner.param]["exp_avg"], self.state[owner.param]["exp_avg_sq"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of ``torch.optim.AdamW`` returned.

        Raises:
            UnsupportedError: it is of an optimizer with an option that is refused here; nothing
                was loaded.
        """
        for group in state_dict["param_groups"]:
            _refuse_options(group)
        super().load_state_dict(state_dict)
        for owner in self._offloaded_params():
            state = self.state[owner.param]
            with owner.context.lock:
                for which, key in enumerate(("exp_avg", "exp_avg_sq")):
                    owner.context.moment(owner, which).copy_(state.pop(key))

    def _offloaded_params(self) -> list[OffloadedParam]:
        """Offloaded parameters that have state, in the order of the param groups."""
        params = [p for group in self.param_groups for p in group["params"] if self.state.get(p)]
        return [owner for owner in map(owner_of, params) if owner is not None]

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout is not torch.strided:
                    raise UnsupportedError(
                        "offload.AdamW does not support sparse gradients; use sparse=False in "
                        "the embedding, or torch.optim.SparseAdam"
                    )

    def _hyper(self, group: dict[str, Any], step: float) -> _native.AdamWHyper:
        beta1, beta2 = group["betas"]
        lr, weight_decay = _as_torch_rounds(group["lr"], group["weight_decay"], 1 - beta1**step)
        return _native.AdamWHyper(
            lr=lr,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=weight_decay,
            step=step,
            maximize=group["maximize"],
            rounding=aten_rounding(),
        )


def _as_torch_rounds(
    lr: float | torch.Tensor, weight_decay: float, bias_correction: float
) -> tuple[float, float]:
    """Return the lr and the weight decay that give torch's bits in fp64.

    With a tensor as lr, torch rounds what it computes from it to that tensor's dtype: the decay
    ``1 - lr * weight_decay`` and the step ``lr / bias_correction``. What is returned leads to the
    same two numbers.
    """
    if not isinstance(lr, torch.Tensor) or lr.dtype is torch.float64:
        return float(lr), weight_decay
    decay = float(1 - lr * weight_decay)
    exact = float(lr / bias_correction) * bias_correction
    return exact, (1 - decay) / exact if exact else 0.0


def _segment(owner: OffloadedParam, hyper: _native.AdamWHyper) -> _native.UpdateSegment:
    grad = owner.param.grad
    if not isinstance(grad, GradHandle):  # the user assigned a tensor of their own
        if grad is None:
            raise OffloadError(f"{owner.name} has no gradient to update by (internal error)")
        owner.context.set_grad(owner, grad)
    state = owner.grad_state
    if state is None:
        raise OffloadError(f"the gradient of {owner.name} was not taken over (internal error)")
    if state.zero:
        state.store(state.materialize())
    begin = owner.offset // 4
    end = begin + owner.nbytes // 4
    return _native.UpdateSegment(begin, end, hyper, state.factor_values())


def _refuse_options(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "capturable", "differentiable"):
        if group.get(name):
            raise UnsupportedError(f"offload.AdamW does not support {name}=True")


def _check_hyperparameters(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if isinstance(group["lr"], torch.Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"offload.AdamW: invalid lr: {group['lr']}; expected one element")
    for name, value, holds in (
        ("lr", group["lr"], group["lr"] >= 0),
        ("eps", group["eps"], group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
        ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
    ):
        if not holds:
            raise ValueError(f"offload.AdamW: invalid {name}: {value}")
