"""spill() against the real class, bit for bit, on torch's own optimizer test data base."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from spilled import (
    assert_same_dicts,
    assert_same_params,
    disk_bytes,
    parameters,
    policy,
    set_gradients,
    state_pages,
)
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    optim_db,
)

from offload import UnsupportedError
from offload.optim import spill

REFUSED = {"LBFGS", "SparseAdam"}
STEPS = 4
MATRICES = [(31, 47), (40, 40), (64, 17), (9, 130), (25, 25), (32, 48), (20, 80)]
HOST = {torch.float32: 24 << 10, torch.bfloat16: 12 << 10, torch.complex64: 48 << 10}
"""Little more than what three states of the largest parameter take."""


def cases() -> Iterator[Any]:
    for info in optim_db:
        if info.name in REFUSED:
            continue
        for i, sample in enumerate(info.optim_inputs_func("cpu")):
            if sample.kwargs.get("capturable"):
                continue
            flags = [{}, {"foreach": True}, {"fused": True}, {"foreach": False}]
            for flag in flags:
                if any(value and name not in info.supported_impls for name, value in flag.items()):
                    continue
                if "fused" in flag and "cpu" not in info.supports_fused_on:
                    continue
                if "foreach" in flag and "foreach" not in info.supported_impls:
                    continue
                for dtype in (torch.float32, torch.bfloat16, torch.complex64):
                    if dtype is not torch.float32 and (i > 1 or "foreach" in flag):
                        continue
                    if dtype.is_complex and (not info.supports_complex or "fused" in flag):
                        continue
                    kwargs = {**sample.kwargs, **flag}
                    name = f"{info.name}-{sample.desc}-{flag}-{dtype}".replace(" ", "_")
                    yield pytest.param(info, kwargs, dtype, id=name)


@pytest.mark.usefixtures("tiny_states_too")
@pytest.mark.parametrize(("info", "kwargs", "dtype"), list(cases()))
def test_same_bits_as_the_class(
    info: OptimizerInfo, kwargs: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    ours, theirs = (params_for(info, dtype) for _ in "ab")
    cls: Any = info.optim_cls
    spilled = spill(cls, ours, policy=policy(tmp_path, host(info, dtype)), **deepcopy(kwargs))
    real = cls(theirs, **deepcopy(kwargs))
    assert_same_dicts(spilled.state_dict(), real.state_dict())
    for step in range(STEPS):
        set_gradients(step, ours, theirs)
        spilled.step()
        real.step()
        assert_same_params(ours, theirs)
        assert_same_dicts(spilled.state_dict(), real.state_dict())
    if state_pages(real) > host(info, dtype):
        written, read = disk_bytes(spilled)
        assert written > 0
        assert read > 0
    usage = spilled._spill._home.mover.ring.usage()  # type: ignore[attr-defined]
    assert usage["peak"] <= host(info, dtype)


def params_for(info: OptimizerInfo, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return parameters(MATRICES, dtype) if info.name == "Muon" else parameters(dtype=dtype)


def host(info: OptimizerInfo, dtype: torch.dtype) -> int:
    return 12 << 10 if info.name == "Adafactor" else HOST[dtype]


@pytest.mark.parametrize(
    "info", [i for i in optim_db if i.name not in REFUSED], ids=lambda i: i.name
)
def test_the_states_of_every_class_exceed_the_memory(info: OptimizerInfo) -> None:
    """Or else the test above would show nothing."""
    for dtype, memory in HOST.items():
        if dtype.is_complex and not info.supports_complex:
            continue
        params = params_for(info, dtype)
        cls: Any = info.optim_cls
        real = cls(params, **({"momentum": 0.9} if info.name == "SGD" else {}))
        set_gradients(0, params)
        real.step()
        assert state_pages(real) > min(memory, host(info, dtype))


def errors() -> Iterator[Any]:
    for info in optim_db:
        if info.name in REFUSED or info.optim_error_inputs_func is None:
            continue
        for sample in info.optim_error_inputs_func("cpu", torch.float32):
            name = f"{info.name}-{sample.optimizer_error_input.desc}".replace(" ", "_")
            yield pytest.param(info, sample, id=name)


@pytest.mark.parametrize(("info", "sample"), list(errors()))
def test_same_errors_as_the_class(info: OptimizerInfo, sample: Any, tmp_path: Path) -> None:
    with pytest.raises((sample.error_type, UnsupportedError)) as found:
        provoke(info, sample, tmp_path)
    if not isinstance(found.value, UnsupportedError):
        found.match(sample.error_regex)


def provoke(info: OptimizerInfo, sample: Any, folder: Path) -> None:
    given = sample.optimizer_error_input
    params = given.params
    if params is None:
        params = [torch.nn.Parameter(torch.randn(2, 3))]
    spilled = spill(info.optim_cls, params, policy=policy(folder), **given.kwargs)
    if sample.error_on is OptimizerErrorEnum.STEP_ERROR:
        spilled.step()
