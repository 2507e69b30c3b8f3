"""The native update rules against the classes of torch.optim, bit for bit.

The reference is the for-loop path (``foreach=False``), without exceptions: no rule needs the
tolerance of a unit in the last place. All NaNs count as one value.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rule_testing import Case, Values, differing, isas_that_round_like, native_step, torch_step

from offload.optim.aten_rounding import aten_rounding

STEPS = [1, 2, 3, 10, 1000, 12345, 10**6, 16777215]
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.3, 0.9999999), (0.0, 0.0)]


def adam_cases(rule: str) -> list[Case]:
    variants = itertools.product((0.0, 0.1), (False, True), (False, True))
    cases = [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay, **flags}
        for decay, amsgrad, maximize in variants
        for flags in [{"amsgrad": amsgrad, "maximize": maximize}]
    ]
    cases += [
        {"lr": 0.0, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.01},
        {"lr": 1.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "maximize": True},
        {"lr": 5e-324, "betas": (0.8, 0.9999), "eps": 1.0, "weight_decay": 300.0},
        {"lr": 0.1, "betas": (0.3, 0.9999999), "eps": 1e-15, "weight_decay": 0.5},
    ]
    return [Case(rule, arguments) for arguments in cases]


CASES = [
    *adam_cases("adamw"),
    *adam_cases("adam"),
    *(
        Case("sgd", {"lr": 0.1, **arguments})
        for arguments in [
            {},
            {"weight_decay": 0.01},
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.3, "maximize": True},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.37, "nesterov": True, "weight_decay": 1e-4, "maximize": True},
            {"momentum": 0.99, "dampening": 1.0, "weight_decay": 2.0},
            {"momentum": 1.5},
        ]
    ),
    Case("sgd", {"lr": 0.0, "momentum": 0.9}),
    *(
        Case("adagrad", arguments)
        for arguments in [
            {"lr": 0.01, "eps": 1e-10},
            {"lr": 0.1, "lr_decay": 1e-3, "eps": 1e-10, "weight_decay": 0.01},
            {"lr": 1.0, "eps": 0.0, "maximize": True},
            {"lr": 0.0, "lr_decay": 0.5, "eps": 1.0, "weight_decay": 3.0, "maximize": True},
        ]
    ),
    *(
        Case("rmsprop", {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, **arguments})
        for arguments in [
            {},
            {"weight_decay": 0.01, "maximize": True},
            {"momentum": 0.9},
            {"centered": True},
            {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
            {"alpha": 0.3, "momentum": 0.1, "centered": True, "maximize": True},
            {"alpha": 0.0, "eps": 0.0, "lr": 1.0},
        ]
    ),
    *(
        Case("lion", {"maximize": False, "weight_decay": 0.0, **arguments})
        for arguments in [
            {"lr": 1e-4, "betas": (0.9, 0.99)},
            {"lr": 3e-4, "betas": (0.95, 0.98), "weight_decay": 0.1, "maximize": True},
            {"lr": 1.0, "betas": (0.0, 0.0), "weight_decay": 2.0},
        ]
    ),
]


def zeros_have_any_sign(case: Case) -> bool:
    """With a lerp_ of weight one, a zero's sign depends on its position in torch's own loop."""
    return case.arguments.get("betas", (1.0, 1.0))[0] == 0 or case.arguments.get("alpha") == 0


def check(values: Values, n: int, case: Case, kind: str, isas: list[str]) -> None:
    step = values.random.choice(STEPS)
    first = case.rule == "sgd" and "momentum" in case.arguments and values.random.random() < 0.3
    factors = values.factors(values.random.randrange(4))
    operands = values.operands(case, n, kind)
    expected = torch_step(case, operands, step, factors, first=first)
    any_zero = zeros_have_any_sign(case)
    offset = values.random.randrange(17)
    for isa in isas:
        got = native_step(
            case, operands, step, factors, isa, aten_rounding(), first=first, offset=offset
        )
        for name, a, b in zip(["param", *case.states], got, expected, strict=True):
            count = differing(a, b, any_zero)
            assert count == 0, f"{count} of {n} {name}: {isa} {kind} {case} {step=} {factors}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_small_size(case: Case) -> None:
    values, isas = Values(CASES.index(case)), isas_that_round_like(aten_rounding())
    for n in range(1, 71):
        check(values, n, case, values.random.choice(["normal", "wide", "special"]), isas)


@pytest.mark.parametrize("kind", ["normal", "wide", "special"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_size(case: Case, kind: str) -> None:
    values, isas = Values(CASES.index(case)), isas_that_round_like(aten_rounding())
    check(values, 257, case, kind, isas)
    check(values, 30_011, case, kind, isas)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "adagrad", "rmsprop", "lion"])
def test_size_that_torch_splits_over_threads(rule: str) -> None:
    values = Values(5)
    case = [case for case in CASES if case.rule == rule][1]
    isas = [isa for isa in isas_that_round_like(aten_rounding()) if isa != "scalar"]
    check(values, 1_000_003, case, "wide", isas)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "adagrad", "rmsprop", "lion"])
def test_random_hyperparameters(rule: str) -> None:
    values, isas = Values(6), isas_that_round_like(aten_rounding())
    draw = values.random

    def drawn() -> Case:
        arguments = {"lr": 10 ** draw.uniform(-6, -1), "maximize": draw.random() < 0.3}
        arguments["weight_decay"] = draw.choice([0.0, 10 ** draw.uniform(-4, 0)])
        if rule in ("adamw", "adam", "lion"):
            arguments["betas"] = (draw.random(), 1 - 10 ** draw.uniform(-4, 0))
        if rule in ("adamw", "adam"):
            arguments["amsgrad"] = draw.random() < 0.5
        if rule in ("adamw", "adam", "adagrad", "rmsprop"):
            arguments["eps"] = 10 ** draw.uniform(-15, -3)
        if rule in ("sgd", "rmsprop"):
            arguments["momentum"] = draw.choice([0.0, draw.random()])
        if rule == "sgd" and arguments["momentum"]:
            arguments["nesterov"] = draw.random() < 0.5
            arguments["dampening"] = 0.0 if arguments["nesterov"] else draw.random()
        if rule == "adagrad":
            arguments["lr_decay"] = draw.choice([0.0, draw.random()])
        if rule == "rmsprop":
            arguments |= {"alpha": draw.random(), "centered": draw.random() < 0.5}
        return Case(rule, arguments)

    for _ in range(40):
        check(values, 1009, drawn(), draw.choice(["normal", "wide"]), isas)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_steps(case: Case) -> None:
    """From no state at all, as a run of training does."""
    values, n = Values(7), 1_003
    isas = isas_that_round_like(aten_rounding())
    theirs = [values.tensor(n, "normal"), *(torch.zeros(n) for _ in case.states)]
    ours = {isa: [t.clone() for t in theirs] for isa in isas}
    factors = [torch.tensor(f).item() for f in (1 / 1024, 0.3713)]
    for step in range(1, 13):
        grad = values.tensor(n, "normal") * 0.01
        first = step == 1 and bool(case.arguments.get("momentum")) and case.rule == "sgd"
        theirs = torch_step(case, [theirs[0], grad, *theirs[1:]], step, factors, first=first)
        for isa, mine in ours.items():
            operands = [mine[0], grad, *mine[1:]]
            ours[isa] = native_step(
                case, operands, step, factors, isa, aten_rounding(), first=first
            )
            assert [differing(a, b) for a, b in zip(ours[isa], theirs, strict=True)] == [0] * len(
                theirs
            )


KERNELS = [
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    # MKL on Intel CPUs takes its roots as on an older one; elsewhere this changes nothing.
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
]


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs in a child of this test")
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: "-".join(kernels.values()))
def test_other_kernels_of_torch(kernels: dict[str, str]) -> None:
    """The same checks in a process whose torch uses its kernels for an older CPU."""
    here = Path(__file__).parent
    tests = "small_size or exactly_one or tells_all"
    files = [str(here / "test_rule_bits.py"), str(here / "test_aten_rounding.py")]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, *files],
        env={**os.environ, **kernels},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert f"{len(CASES) + 2} passed" in child.stdout
