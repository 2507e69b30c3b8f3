"""Narrow parameters and states: torch's step between the decoding and the encoding.

With states in fp32 an update must give what torch's class gives in fp32 on the master copy, rounded
as the format says; bit for bit, all NaNs alike. With narrower states it must give the same up to
rounding, which is then the library's own, and the same bits on every instruction set.
"""

from __future__ import annotations

import pytest
import torch
from rule_testing import Case, Values, differing, isas_that_round_like, torch_step

from offload import OffloadError, _native
from offload.optim.aten_rounding import aten_rounding

N = 3_011
BLOCK = _native.quant_block
CASES = [
    Case("adamw", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
    Case("adam", {"lr": 1e-3, "betas": (0.9, 0.95), "amsgrad": True, "weight_decay": 0.1}),
    Case("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Case("sgd", {"lr": 0.1, "maximize": True}),
    Case("adagrad", {"lr": 0.01, "lr_decay": 0.1, "eps": 1e-10}),
    Case("rmsprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-8, "momentum": 0.5, "centered": True}),
    Case("lion", {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": False}),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
FORMATS = [
    _native.UpdateFormat(param, state)
    for param in DTYPES
    for state in STATE_DTYPES
    if (param, state) != ("float32", "float32")
]


def name_of(form: _native.UpdateFormat) -> str:
    return f"{form.param}-{form.state}"


class Stored:
    """The operands of one parameter as the format has them."""

    def __init__(self, case: Case, form: _native.UpdateFormat, operands: list[torch.Tensor]):
        self.case, self.form = case, form
        self.hyper = case.native(7, aten_rounding())
        dtype = DTYPES[form.param]
        self.param = operands[0].to(dtype)
        self.grad = operands[1].to(dtype)
        self.master = operands[0].clone() if form.has_master else None
        self.states, self.scales = [], []
        for k, values in enumerate(operands[2:]):
            self.states.append(torch.zeros(len(values), dtype=STATE_DTYPES[form.state]))
            self.scales.append(torch.zeros(-(-len(values) // BLOCK)))
            _native.encode_state(self.hyper, form, k, values.data_ptr(), *self._at(k))

    def _at(self, k: int) -> tuple[int, int, int]:
        scale = self.scales[k].data_ptr() if self.form.state == "int8" else 0
        return self.states[k].data_ptr(), scale, len(self.states[k])

    def decoded(self, k: int) -> torch.Tensor:
        out = torch.empty(len(self.states[k]))
        state, scale, n = self._at(k)
        _native.decode_state(self.hyper, self.form, k, state, scale, out.data_ptr(), n)
        return out

    def update(self, factors: list[float], isa: str, seed: int = 0) -> None:
        scales = self.scales if self.form.state == "int8" else []
        _native.update(
            self.hyper,
            self.form,
            factors=factors,
            seed=seed,
            parameter=3,
            first=0,
            param=self.param.data_ptr(),
            grad=self.grad.data_ptr(),
            master=0 if self.master is None else self.master.data_ptr(),
            states=[state.data_ptr() for state in self.states],
            scales=[scale.data_ptr() for scale in scales],
            n=len(self.param),
            isa=isa,
        )


def expected(stored: Stored, factors: list[float]) -> list[torch.Tensor]:
    """Parameter (fp32) and states after torch's step on what `stored` holds."""
    grad = stored.grad.clone()
    for factor in factors:
        grad.mul_(torch.tensor(factor))
    param = stored.param if stored.master is None else stored.master
    states = [stored.decoded(k) for k in range(len(stored.states))]
    return torch_step(stored.case, [param, grad.float(), *states], 7, [])


def stored_of(case: Case, form: _native.UpdateFormat, values: Values) -> Stored:
    operands = values.operands(case, N, "normal")
    if case.rule == "rmsprop":
        operands[2] += 100  # no variance below zero
    return Stored(case, form, operands)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.state == "float32"], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_of_torch_on_master_copies(case: Case, form: _native.UpdateFormat) -> None:
    values = Values(CASES.index(case))
    for isa in isas_that_round_like(aten_rounding()):
        stored = stored_of(case, form, values)
        factors = values.factors(values.random.randrange(3))
        param, *states = expected(stored, factors)
        stored.update(factors, isa)
        assert stored.master is not None
        assert differing(stored.master, param) == 0
        assert torch.equal(stored.param, stored.master.to(stored.param.dtype))
        for k, state in enumerate(states):
            assert differing(stored.states[k], state) == 0


@pytest.mark.parametrize("form", [f for f in FORMATS if f.state != "float32"], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_of_torch_between_decoding_and_encoding(
    case: Case, form: _native.UpdateFormat
) -> None:
    values = Values(CASES.index(case))
    first: Stored | None = None
    factors = values.factors(values.random.randrange(3))
    seed = values.random.randrange(1 << 30)
    for isa in _native.isas():
        stored = stored_of(case, form, Values(seed))
        param, *states = expected(stored, factors)
        before = (stored.param if stored.master is None else stored.master).clone()
        stored.update(factors, isa)
        got = stored.param if stored.master is None else stored.master
        # A few units in the last place of the step, and one of the parameter.
        torch.testing.assert_close(got - before, param - before, rtol=2e-6, atol=5e-7)
        if stored.master is not None:
            assert torch.equal(stored.param, stored.master.to(stored.param.dtype))
        for k, state in enumerate(states):
            assert_close_as_stored(stored, k, state)
        if first is None:
            first = stored
        assert differing(got, first.param if first.master is None else first.master) == 0
        for name in ("states", "scales"):
            for a, b in zip(getattr(stored, name), getattr(first, name), strict=True):
                assert torch.equal(a, b)


def assert_close_as_stored(stored: Stored, k: int, state: torch.Tensor) -> None:
    """State `k` must be `state` as the format rounds it, or its neighbour."""
    decoded = stored.decoded(k)
    if stored.form.state == "bfloat16":  # at random, to one of the neighbours
        ulp = torch.finfo(torch.bfloat16).eps * state.abs()
        assert bool(((decoded - state).abs() <= ulp + 1e-6).all())
        return
    again = Stored(stored.case, stored.form, [state, state, *[state] * len(stored.states)])
    torch.testing.assert_close(stored.scales[k], again.scales[k], rtol=1e-6, atol=0)
    # Beside an edge of two cells a unit in the last place decides.
    assert int((stored.states[k] != again.states[k]).sum()) <= N // 500


@pytest.mark.parametrize("isa", _native.isas())
def test_stochastic_rounding_repeats_with_its_seed_only(isa: str) -> None:
    operands = Values(1).operands(CASES[0], N, "normal")
    runs = []
    for seed in (1, 1, 2):
        stored = Stored(CASES[0], _native.UpdateFormat("float32", "bfloat16"), operands)
        stored.update([], isa, seed)
        runs.append(stored)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].states, runs[1].states, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(runs[0].states, runs[2].states, strict=True))
    assert torch.equal(runs[0].param, runs[2].param), "the parameter depends on the old states only"


def test_bytes() -> None:
    sizes = {name_of(f): (f.param_bytes, f.state_bytes, f.has_master) for f in FORMATS}
    assert sizes["float32-bfloat16"] == (4, 2, False)
    assert sizes["float32-int8"] == (4, 1, False)
    assert sizes["bfloat16-float32"] == (2, 4, True)
    assert sizes["float16-int8"] == (2, 1, True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OffloadError, match="update rule 'adamax'"):
        _native.UpdateHyper("adamax", rounding=aten_rounding())
    with pytest.raises(OffloadError, match="parameter type 'float64'"):
        _native.UpdateFormat("float64")
    with pytest.raises(OffloadError, match="state format 'int4'"):
        _native.UpdateFormat(state="int4")


def test_operands_that_do_not_fit_are_refused() -> None:
    stored = Stored(CASES[0], FORMATS[0], Values(2).operands(CASES[0], 10, "normal"))
    stored.states.pop()
    with pytest.raises(OffloadError, match="needs 2 states"):
        stored.update([], "scalar")
    master = Stored(
        CASES[3],
        _native.UpdateFormat("bfloat16", "float32"),
        Values(2).operands(CASES[3], 10, "normal"),
    )
    master.master = None
    with pytest.raises(OffloadError, match="master"):
        master.update([], "scalar")
    with pytest.raises(OffloadError, match="none of index 2"):
        _native.decode_state(stored.hyper, stored.form, 2, 0, 0, 0, 0)
