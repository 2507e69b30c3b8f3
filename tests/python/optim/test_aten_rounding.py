"""Finding out how torch rounds here."""

from __future__ import annotations

import warnings

import pytest
from rule_testing import Case, Values, differing, native_step, torch_step

from offload import UnsupportedError, _native
from offload.optim import aten_rounding as rounding_module
from offload.optim.aten_rounding import aten_rounding

RULES = [(fma, rule) for fma in (True, False) for rule in _native.sqrt_rules(_native.best_isa())]
TYPICAL = Case("adamw", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})


def matches(values: Values, rounding: _native.AtenRounding) -> bool:
    operands = values.operands(TYPICAL, 1 << 16, "wide")
    expected = torch_step(TYPICAL, operands, 10, [])
    got = native_step(TYPICAL, operands, 10, [], _native.best_isa(), rounding)
    return all(differing(a, b) == 0 for a, b in zip(got, expected, strict=True))


def test_exactly_one_rounding_matches() -> None:
    """But for the two that differ at the ends of fp32's range only."""
    found = [rule for rule in RULES if matches(Values(8), _native.AtenRounding(*rule))]
    rounding = aten_rounding()
    assert (rounding.fma, rounding.sqrt) in found, "the rule that was found is wrong"
    alike = {(rounding.fma, rule) for rule in ("ieee", "rsqrt-fma")}
    assert len(found) == 1 or set(found) == alike, "a wrong rule goes unnoticed"


def test_calibration_sample_tells_all_rules_apart() -> None:
    sample = rounding_module._sample()
    results = [
        tuple(rounding_module._native_step(sample, _native.AtenRounding(*rule), _native.best_isa()))
        for rule in RULES
    ]
    assert len(set(results)) == len(RULES)


def test_unknown_rounding_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_module, "_torch_step", lambda inputs: [b"", b"", b""])
    with pytest.warns(UserWarning, match=r"differ from\s+torch.optim"):
        rounding_module.aten_rounding.__wrapped__()


def test_known_rounding_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rounding_module.aten_rounding.__wrapped__()
    assert (found.fma, found.sqrt) == (aten_rounding().fma, aten_rounding().sqrt)


@pytest.mark.parametrize("isa", _native.isas())
def test_unavailable_rule_is_refused(isa: str) -> None:
    operands = Values(9).operands(TYPICAL, 4, "normal")
    for rule in {"ieee", "rsqrt", "rsqrt-fma", "rsqrt14-fma"} - set(_native.sqrt_rules(isa)):
        with pytest.raises(UnsupportedError, match=f"{isa}.*{rule}"):
            native_step(TYPICAL, operands, 1, [], isa, _native.AtenRounding(True, rule))
    with pytest.raises(UnsupportedError, match="sse9"):
        native_step(TYPICAL, operands, 1, [], "sse9", aten_rounding())
