"""What the tests of the update rules share: operands, torch's step and the native one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from offload import _native

SPECIALS = torch.tensor(
    [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        1e-45,
        -1e-45,
        1e-38,
        -3e-39,
        3.4e38,
        -3.4e38,
        1.0,
    ]
)
STEPS = [1, 2, 3, 10, 1000, 12345, 10**6, 16777215]
FACTORS = [1.0, 0.37, 1 / 65536, -2.0, 3e-5, 0.7133]


class Lion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2."""

    def __init__(self, params: Any, foreach: bool = False, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                grad = -p.grad if group["maximize"] else p.grad
                exp_avg = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = (exp_avg * beta1 + grad * (1 - beta1)).sign_()
                p.add_(update, alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "lion": Lion,
}
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg")


@dataclass(frozen=True)
class Case:
    """A rule with the arguments of its class, such as ``betas``."""

    rule: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.rule} {self.arguments}"

    @property
    def states(self) -> list[str]:
        """The names of the states, in the native order."""
        a = self.arguments
        if self.rule in ("adamw", "adam"):
            return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if a.get("amsgrad") else [])]
        if self.rule == "sgd":
            return ["momentum_buffer"] if a.get("momentum") else []
        if self.rule == "rmsprop":
            momentum = ["momentum_buffer"] if a.get("momentum") else []
            return ["square_avg", *momentum, *(["grad_avg"] if a.get("centered") else [])]
        return {"adagrad": ["sum"], "lion": ["exp_avg"]}[self.rule]

    def native(
        self, step: int, rounding: _native.AtenRounding, first: bool = False
    ) -> _native.UpdateHyper:
        a = dict(self.arguments)
        if "betas" in a:
            a["beta1"], a["beta2"] = a.pop("betas")
        return _native.UpdateHyper(self.rule, **a, step=float(step), first=first, rounding=rounding)


class Values:
    """Random operands of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def tensor(self, n: int, kind: str) -> torch.Tensor:
        normal = torch.randn(n, generator=self.generator)
        if kind == "normal":
            return normal
        if kind == "wide":
            return normal * 10.0 ** torch.randint(-30, 20, (n,), generator=self.generator)
        bits = torch.randint(-(2**31), 2**31 - 1, (n,), generator=self.generator).int()
        special = SPECIALS[torch.randint(len(SPECIALS), (n,), generator=self.generator)]
        choice = torch.randint(4, (n,), generator=self.generator)
        mixed = torch.where(choice == 0, bits.view(torch.float32), normal)
        return torch.where(choice == 1, special, mixed)

    def operands(self, case: Case, n: int, kind: str) -> list[torch.Tensor]:
        """Parameter, gradient, states."""
        made = [self.tensor(n, kind), self.tensor(n, kind)]
        for name in case.states:
            value = self.tensor(n, kind)
            made.append(value.abs() if name in SQUARES else value)
        return made

    def factors(self, count: int) -> list[float]:
        return [torch.tensor(self.random.choice(FACTORS)).item() for _ in range(count)]


def torch_step(
    case: Case,
    operands: list[torch.Tensor],
    step: int,
    factors: list[float],
    *,
    first: bool = False,
    foreach: bool = False,
) -> list[torch.Tensor]:
    """Return parameter and states after one step of the torch class."""
    param = torch.nn.Parameter(operands[0].clone())
    param.grad = operands[1].clone()
    for factor in factors:
        param.grad.mul_(torch.tensor(factor))
    optimizer = CLASSES[case.rule]([param], foreach=foreach, **case.arguments)
    states = {name: t.clone() for name, t in zip(case.states, operands[2:], strict=True)}
    optimizer.state[param] = {"step": torch.tensor(float(step - 1)), **states}
    if first:
        optimizer.state[param]["momentum_buffer"] = None
    optimizer.step()
    return [param.detach(), *(optimizer.state[param][name] for name in case.states)]


def native_step(
    case: Case,
    operands: list[torch.Tensor],
    step: int,
    factors: list[float],
    isa: str,
    rounding: _native.AtenRounding,
    *,
    first: bool = False,
    offset: int = 0,
) -> list[torch.Tensor]:
    """One step on copies that start `offset` elements after an aligned address (each its own)."""
    n = len(operands[0])
    copies = []
    for k, operand in enumerate(operands):
        start = offset * (k + 1) % 17
        copies.append(torch.full((n + 40,), 7.0)[start:])
        copies[k][:n] = operand
    pointers = [copy.data_ptr() for copy in copies]
    _native.update(
        case.native(step, rounding, first),
        _native.UpdateFormat(),
        factors=factors,
        seed=0,
        parameter=0,
        first=0,
        param=pointers[0],
        grad=pointers[1],
        master=0,
        states=pointers[2:],
        scales=[],
        n=n,
        isa=isa,
    )
    assert all(bool((copy[n:] == 7.0).all()) for copy in copies), "wrote past the end"
    assert differing(copies[1][:n], operands[1]) == 0, "the gradient was changed"
    return [copies[k][:n] for k in range(len(copies)) if k != 1]


def differing(a: torch.Tensor, b: torch.Tensor, any_zero: bool = False) -> int:
    """How many elements differ in their bits; all NaNs count as one value."""
    other = (a.view(torch.int32) != b.view(torch.int32)) & ~(a.isnan() & b.isnan())
    if any_zero:
        other &= (a != 0) | (b != 0)
    return int(other.sum())


def isas_that_round_like(rounding: _native.AtenRounding) -> list[_native.Isa]:
    """Return the instruction sets that can take this machine's square roots.

    On Intel's AVX-512 CPUs that leaves out AVX2, which has no VRSQRT14PS.
    """
    return [isa for isa in _native.isas() if rounding.sqrt in _native.sqrt_rules(isa)]
