"""offload.optim.Adafactor: torch's bits, plain and wrapped, and on copies of 16-bit parameters."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family as f
import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from offload import optim

INFO = next(info for info in optim_db if info.name == "Adafactor")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
BOTH_PLACES = pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])


class Model(f.Model):
    """Without the empty parameter, whose root mean square torch cannot divide by."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        for part in self.parts:
            part.empty = nn.Parameter(torch.ones(2, 3).to(dtype))


def placed(
    place: str, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    if place == "wrapped":
        return f.wrapped(Model(dtype), folder), {}
    return Model(dtype), {} if place == "memory" else {"policy": f.disk_policy(folder)}


@pytest.mark.parametrize("sample", INFO.optim_inputs_func("cpu"), ids=lambda s: s.desc)
@BOTH_PLACES
def test_same_bits_as_torch(place: str, sample: Any, tmp_path: Path) -> None:
    theirs = Model()
    ours, where = placed(place, tmp_path)
    optimizer = optim.Adafactor(ours.parameters(), foreach=True, **sample.kwargs, **where)
    real = torch.optim.Adafactor(theirs.parameters(), foreach=False, **sample.kwargs)
    for step in range(4):
        if step == 2:  # resumed, from torch's state even
            optimizer = optim.Adafactor(ours.parameters(), **sample.kwargs, **where)
            optimizer.load_state_dict(copy.deepcopy(real.state_dict()))
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
        f.assert_same(ours, theirs)
    f.assert_same_state(optimizer.state_dict(), real.state_dict())
    again = torch.optim.Adafactor(theirs.parameters(), foreach=False)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    f.set_gradients(4, ours, theirs)
    optimizer.step()
    again.step()
    f.assert_same(ours, theirs)


@HALF
@BOTH_PLACES
def test_master_copies(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = Model(dtype)
    ours, where = placed(place, tmp_path, dtype)
    masters = [nn.Parameter(p.detach().float()) for p in theirs.parameters()]
    optimizer = optim.Adafactor(ours.parameters(), lr=0.1, **where)
    real = torch.optim.Adafactor(masters, lr=0.1, foreach=False)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = optim.Adafactor(ours.parameters(), lr=0.1, **where)
            optimizer.load_state_dict(saved)
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        for param, master in zip(theirs.parameters(), masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        real.step()
        for param, master in zip(theirs.parameters(), masters, strict=True):
            if param.grad is not None:
                param.detach().copy_(master.detach())
        f.assert_same(ours, theirs)
    for key, state in optimizer.state_dict()["state"].items():
        assert f.same_bits(state["master"], masters[key])


@pytest.mark.parametrize("place", ["memory", "wrapped"])
def test_in_a_loop(place: str, tmp_path: Path) -> None:
    ours, theirs = f.net(), f.net()
    if place == "wrapped":
        f.wrapped(ours, tmp_path)
    for model, make in ((ours, optim.Adafactor), (theirs, torch.optim.Adafactor)):
        optimizer: Any = make(model.named_parameters(), lr=0.02, foreach=False)  # type: ignore[operator]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                f.loss_of(model, 2 * step + micro).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
    f.assert_same(ours, theirs)


def test_copies_go_on_alike() -> None:
    model = Model(torch.bfloat16)
    optimizer = optim.Adafactor(model.parameters())
    f.set_gradients(0, model)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    f.set_gradients(1, model, twin)
    optimizer.step()
    twin_optimizer.step()
    f.assert_same(model, twin)


def errors() -> Iterator[Any]:
    for sample in INFO.optim_error_inputs_func("cpu", torch.float32):
        if sample.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR and sample.error_type in (
            ValueError,
            TypeError,
        ):
            yield pytest.param(sample, id=sample.optimizer_error_input.desc)


@pytest.mark.parametrize("sample", list(errors()))
def test_same_errors_as_torch(sample: Any) -> None:
    given = sample.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(1))]
    with pytest.raises(sample.error_type, match=sample.error_regex):
        optim.Adafactor(params, **given.kwargs)


SHAPES = [
    (),
    (1,),
    (3,),
    (5000,),
    (1, 1),
    (1, 77),
    (300, 1),
    (2, 3),
    (64, 5, 3, 3),
    (4, 1, 19),
    (4, 19, 1),
    (3, 40000),
    (40000, 9),
    (700, 801),
]
"""Where ATen goes different ways, and of more than one chunk."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": torch.tensor(0.3), "weight_decay": 0.1},
    {"lr": torch.tensor([0.05], dtype=torch.float64), "maximize": True, "eps": (1e-4, 0.5)},
    {"beta2_decay": -0.01, "d": 2.5, "weight_decay": 0.01, "eps": (0.0, 1e-3)},
]


def compare(grads: list[list[torch.Tensor]], kwargs: dict[str, Any]) -> None:
    """Step twins on the same gradients."""
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(grad.shape, generator=generator) for grad in grads[0]]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizer = optim.Adafactor(ours, **kwargs)
    real = torch.optim.Adafactor(theirs, foreach=False, **kwargs)
    for step in grads:
        for grad, a, b in zip(step, ours, theirs, strict=True):
            a.grad, b.grad = grad.clone(), grad.clone()
        optimizer.step()
        real.step()
        for a, b in zip(ours, theirs, strict=True):
            assert same_but_nan(a, b), tuple(a.shape)
            for name, value in real.state[b].items():
                assert same_but_nan(optimizer.state[a][name], value), (tuple(a.shape), name)


def same_but_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; NaNs have no payload here."""
    a, b = (torch.where(t.isnan(), torch.nan, t.detach()) for t in (a, b))
    return f.same_bits(a, b)


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_shapes(kwargs: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [
        [torch.randn(shape, generator=generator) * 10.0 ** (step - 1) for shape in SHAPES]
        for step in range(4)
    ]
    compare(grads, kwargs)


def test_extreme_gradients() -> None:
    values = [0.0, -0.0, 1e-45, 1e-38, 1e-20, 3e19, 3e38]
    generator = torch.Generator().manual_seed(2)
    grads = []
    for special in (*values, torch.inf, torch.nan):
        step = [torch.full((5, 7), special), torch.full((9,), special)]
        step += [torch.randn(40, 50, generator=generator), torch.randn(60, generator=generator)]
        step[2][3, 4] = step[3][17] = special
        grads.append(step)
    for step in grads:  # each from the beginning: what follows a NaN is NaN
        compare([step, grads[0]], {})


def test_adopts_statistics_of_another_layout() -> None:
    ours, theirs = nn.Parameter(torch.ones(6, 8, 4)), nn.Parameter(torch.ones(6, 8, 4))
    optimizer, real = optim.Adafactor([ours]), torch.optim.Adafactor([theirs], foreach=False)
    for step in range(3):
        ours.grad = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        if step == 1:
            col_var = optimizer.state[ours]["col_var"]
            optimizer.state[ours]["col_var"] = (
                col_var.double().permute(2, 1, 0).clone().permute(2, 1, 0)
            )
        optimizer.step()
        real.step()
    assert f.same_bits(ours, theirs)
    optimizer.state[ours]["row_var"] = torch.zeros(8, 1)
    with pytest.raises(ValueError, match="row_var has the shape"):
        optimizer.step()


MEMORY = """
import resource, torch
from offload import optim

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

param = torch.nn.Parameter(torch.ones(4096, 8192))
param.grad = torch.full_like(param, 0.5)
small = torch.nn.Parameter(torch.ones(32, 32))
small.grad = torch.ones(32, 32)
optim.Adafactor([small]).step()
before = peak()
optim.Adafactor([param]).step()
print(peak() - before)
"""


def test_makes_nothing_of_the_parameters_size() -> None:
    """Of 128 MiB; torch's step has two temporaries of that size."""
    output = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    ).stdout
    assert int(output) < 8 << 20
