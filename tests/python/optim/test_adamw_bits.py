"""The native AdamW kernels against torch.optim.AdamW, bit for bit (all NaNs count as one value)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from offload import _native
from offload.optim import aten_rounding as rounding_module
from offload.optim.aten_rounding import aten_rounding

ISAS = _native.isas()
RULES = [(fma, rule) for fma in (True, False) for rule in _native.sqrt_rules(_native.best_isa())]
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


@dataclass(frozen=True)
class Hyper:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    def native(self, step: int, rounding: _native.AtenRounding) -> _native.AdamWHyper:
        return _native.AdamWHyper(
            self.lr,
            self.beta1,
            self.beta2,
            self.eps,
            self.weight_decay,
            float(step),
            self.maximize,
            rounding,
        )


HYPERS = [
    Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01, False),
    Hyper(3e-4, 0.9, 0.95, 1e-8, 0.1, True),
    Hyper(1e-2, 0.5, 0.9, 1e-6, 0.0, False),
    Hyper(0.0, 0.9, 0.999, 1e-8, 0.01, False),
    Hyper(1.0, 0.0, 0.0, 0.0, 0.0, True),
    Hyper(5e-324, 0.8, 0.9999, 1.0, 300.0, False),
    Hyper(0.1, 0.3, 0.9999999, 1e-15, 0.5, False),
]
TYPICAL = HYPERS[0]


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

    def operands(self, n: int, kind: str) -> list[torch.Tensor]:
        """Parameter, gradient, exp_avg, exp_avg_sq."""
        made = [self.tensor(n, kind) for _ in range(4)]
        return [*made[:3], made[3].abs()]

    def factors(self, count: int) -> list[float]:
        return [torch.tensor(self.random.choice(FACTORS)).item() for _ in range(count)]


def torch_step(
    operands: list[torch.Tensor], hyper: Hyper, step: int, factors: list[float], foreach: bool
) -> list[torch.Tensor]:
    param = torch.nn.Parameter(operands[0].clone())
    param.grad = operands[1].clone()
    for factor in factors:
        param.grad.mul_(torch.tensor(factor))
    optimizer = torch.optim.AdamW(
        [param],
        lr=hyper.lr,
        betas=(hyper.beta1, hyper.beta2),
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=hyper.maximize,
        foreach=foreach,
    )
    moments = {"exp_avg": operands[2].clone(), "exp_avg_sq": operands[3].clone()}
    optimizer.state[param] = {"step": torch.tensor(float(step - 1)), **moments}
    optimizer.step()
    return [param.detach(), moments["exp_avg"], moments["exp_avg_sq"]]


def native_step(
    operands: list[torch.Tensor],
    hyper: Hyper,
    step: int,
    factors: list[float],
    isa: str,
    rounding: _native.AtenRounding,
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
    param, grad, exp_avg, exp_avg_sq = pointers
    _native.adamw_update(
        hyper.native(step, rounding), factors, param, grad, exp_avg, exp_avg_sq, n, isa
    )
    assert all(bool((copy[n:] == 7.0).all()) for copy in copies), "wrote past the end"
    assert differing(copies[1][:n], operands[1]) == 0, "the gradient was changed"
    return [copies[k][:n] for k in (0, 2, 3)]


def differing(a: torch.Tensor, b: torch.Tensor, any_zero: bool = False) -> int:
    """How many elements differ in their bits."""
    other = (a.view(torch.int32) != b.view(torch.int32)) & ~(a.isnan() & b.isnan())
    if any_zero:
        other &= (a != 0) | (b != 0)
    return int(other.sum())


def check(values: Values, n: int, hyper: Hyper, kind: str, isas: list[_native.Isa]) -> None:
    step = values.random.choice(STEPS)
    factors = values.factors(values.random.randrange(4))
    operands = values.operands(n, kind)
    expected = torch_step(operands, hyper, step, factors, foreach=False)
    # With beta1 = 0 the sign of a zero depends on its position in torch's own loop.
    any_zero = hyper.beta1 == 0
    for a, b in zip(expected, torch_step(operands, hyper, step, factors, True), strict=True):
        assert differing(a, b, any_zero) == 0, "torch's foreach differs from its loop"
    offset = values.random.randrange(17)
    for isa in isas:
        got = native_step(operands, hyper, step, factors, isa, aten_rounding(), offset)
        for name, a, b in zip(("param", "exp_avg", "exp_avg_sq"), got, expected, strict=True):
            count = differing(a, b, any_zero)
            assert count == 0, f"{count} of {n} {name}: {isa} {kind} {hyper} {step} {factors}"


@pytest.mark.parametrize("hyper", HYPERS, ids=range(len(HYPERS)))
def test_every_small_size(hyper: Hyper) -> None:
    values = Values(HYPERS.index(hyper))
    for n in range(1, 71):
        check(values, n, hyper, values.random.choice(["normal", "wide", "special"]), ISAS)


@pytest.mark.parametrize("kind", ["normal", "wide", "special"])
@pytest.mark.parametrize("n", [257, 30_011])
def test_odd_sizes(n: int, kind: str) -> None:
    values = Values(n)
    for hyper in HYPERS:
        check(values, n, hyper, kind, ISAS)


def test_size_that_torch_splits_over_threads() -> None:
    values = Values(5)
    for hyper in HYPERS[:2]:
        check(values, 1_000_003, hyper, "wide", [isa for isa in ISAS if isa != "scalar"])


def test_random_hyperparameters() -> None:
    values = Values(6)
    draw = values.random
    for _ in range(40):
        hyper = Hyper(
            lr=10 ** draw.uniform(-6, -1),
            beta1=draw.random(),
            beta2=1 - 10 ** draw.uniform(-4, 0),
            eps=10 ** draw.uniform(-15, -3),
            weight_decay=draw.choice([0.0, 10 ** draw.uniform(-4, 0)]),
            maximize=draw.random() < 0.3,
        )
        check(values, 1009, hyper, draw.choice(["normal", "wide"]), ISAS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("factors", [[], [1 / 1024, 0.3713]], ids=["plain", "factors"])
def test_many_steps(isa: str, factors: list[float]) -> None:
    values, n = Values(7), 5_003
    factors = [torch.tensor(f).item() for f in factors]
    theirs = [values.tensor(n, "normal"), torch.zeros(n), torch.zeros(n)]
    ours = [t.clone() for t in theirs]
    for step in range(1, 21):
        grad = values.tensor(n, "normal") * 0.01
        hyper = Hyper(3e-4 * step / 20, 0.9, 0.95, 1e-8, 0.1, False)
        operands = [theirs[0], grad, *theirs[1:]]
        theirs = torch_step(operands, hyper, step, factors, foreach=step % 2 == 0)
        operands = [ours[0], grad, *ours[1:]]
        ours = native_step(operands, hyper, step, factors, isa, aten_rounding())
        assert [differing(a, b) for a, b in zip(ours, theirs, strict=True)] == [0, 0, 0]


def matches(operands: list[torch.Tensor], rounding: _native.AtenRounding) -> bool:
    expected = torch_step(operands, TYPICAL, 10, [], foreach=False)
    got = native_step(operands, TYPICAL, 10, [], _native.best_isa(), rounding)
    return all(differing(a, b) == 0 for a, b in zip(got, expected, strict=True))


def test_exactly_one_rounding_matches() -> None:
    operands = Values(8).operands(1 << 16, "wide")
    found = [rule for rule in RULES if matches(operands, _native.AtenRounding(*rule))]
    rounding = aten_rounding()
    assert found == [(rounding.fma, rounding.sqrt)], "a wrong rule goes unnoticed, or none is right"


def test_calibration_sample_tells_all_rules_apart() -> None:
    sample = rounding_module._sample()
    results = [
        tuple(rounding_module._native_step(sample, _native.AtenRounding(*rule), _native.best_isa()))
        for rule in RULES
    ]
    assert len(set(results)) == len(RULES)


def test_unknown_rounding_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_module, "_torch_step", lambda inputs: [b"", b"", b""])
    with pytest.warns(UserWarning, match=r"differ from\s+torch.optim.AdamW"):
        rounding_module.aten_rounding.__wrapped__()


def test_known_rounding_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rounding_module.aten_rounding.__wrapped__()
    assert (found.fma, found.sqrt) == (aten_rounding().fma, aten_rounding().sqrt)


@pytest.mark.parametrize("isa", ISAS)
def test_unavailable_rule_is_refused(isa: str) -> None:
    from offload import UnsupportedError

    operands = Values(9).operands(4, "normal")
    for rule in {"ieee", "rsqrt", "rsqrt-fma", "rsqrt14-fma"} - set(_native.sqrt_rules(isa)):
        with pytest.raises(UnsupportedError, match=f"{isa}.*{rule}"):
            native_step(operands, TYPICAL, 1, [], isa, _native.AtenRounding(True, rule))
    with pytest.raises(UnsupportedError, match="sse9"):
        native_step(operands, TYPICAL, 1, [], "sse9", aten_rounding())


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs in a child of this test")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_kernels_of_torch(capability: str) -> None:
    """The same checks in a process whose torch uses its kernels for an older CPU."""
    tests = "small_size or exactly_one or tells_all"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests]
    child = subprocess.run(
        [*command, str(Path(__file__))],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert f"{len(HYPERS) + 2} passed" in child.stdout
