"""Training on a CUDA device: the bits of a plain model there, and tensors where users expect them.

The plain model is updated on the CPU, as the wrapped one is: see computing_on.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from computing_on import compared_on
from torch import nn

import offload
from offload.runtime.wrapped import wrapped
from offload.tiers.device_tier import DeviceTier
from offload.tiers.grad_handle import GradHandle

pytestmark = [pytest.mark.gpu, pytest.mark.own_device]
CUDA = torch.device("cuda", 0)
UNIT = 2 * 1054720
"""Parameters and gradients of a block of t.Stack."""
MODELS = [
    t.Stack,
    t.Checkpointed,
    t.CheckpointedReentrant,
    t.CheckpointedInside,
    t.UsesOthersWeight,
    t.SharedBlock,
    t.Routed,
    t.Convolutional,
]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with compared_on(CUDA, monkeypatch):
        yield


def policy(folder: Path, make: t.Model = t.Stack, **options: Any) -> offload.Policy:
    """Everything spilled to the disk that may be, and three units on the device."""
    nbytes = options.pop("device_bytes", 3 * UNIT)
    options = {"debug": True, **t.SMALL_BLOCKS, **options}
    budget = offload.Budget(host=t.least_budget(make, **options), device=nbytes)
    return offload.Policy(budget, device="cuda:0", swap_dir=folder, **options)


def wrap(folder: Path, make: t.Model = t.Stack, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return offload.wrap(make(), policy(folder, make, **options))


def tier_of(model: nn.Module) -> DeviceTier:
    (tier,) = wrapped(model).context.tiers
    return tier


def tokens() -> torch.Tensor:
    return torch.arange(24, device=CUDA).view(2, 12)


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_training_is_exact(make: t.Model, lazy: bool, tmp_path: Path) -> None:
    loop = t.Loop(steps=3, micro_batches=2)
    expected = t.plain(make, loop)
    model = wrap(tmp_path, make, lazy_step=lazy, device_bytes=16 * UNIT)
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(expected, t.train(model, optimizer, loop))
    assert tier_of(model).device.stats()["conflicts"] == 0


@pytest.mark.usefixtures("compared")
def test_training_in_three_units_is_exact(tmp_path: Path) -> None:
    loop = t.Loop(steps=3)
    expected = t.plain(t.Stack, loop)
    model = wrap(tmp_path)
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(expected, t.train(model, optimizer, loop))
    found = offload.report(model).as_dict()
    assert found["device_peak_bytes"] <= found["device_budget_bytes"] <= 3 * UNIT
    assert found["to_device_bytes"] > 0
    assert found["to_host_bytes"] > 0


@pytest.mark.usefixtures("compared")
def test_narrow_parameters_and_autocast(tmp_path: Path) -> None:
    dtype = torch.bfloat16

    def made() -> nn.Module:
        return t.Stack().to(dtype)

    loop = t.Loop(steps=2, clip=None)
    torch.manual_seed(0)
    reference = made()
    plain = offload.AdamW(t.groups(reference), lr=1e-2, weight_decay=0.1)  # masters, as the other
    with torch.autocast("cuda", dtype=dtype):
        expected = t.train(reference, plain, loop)
    model = wrap(tmp_path, made)
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    with torch.autocast("cuda", dtype=dtype):
        found = t.train(model, optimizer, loop)
    t.assert_same(expected, found)


@pytest.mark.usefixtures("compared")
def test_blocks_are_recomputed(tmp_path: Path) -> None:
    loop = t.Loop(steps=2)
    expected = t.plain(t.Stack, loop)
    model = wrap(tmp_path, activations="recompute", activation_bytes="1MiB")
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(expected, t.train(model, optimizer, loop))


def test_everything_is_where_users_expect_it(tmp_path: Path) -> None:
    class Buffered(t.Stack):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3))

    model = wrap(tmp_path, Buffered)
    params = list(model.parameters())
    assert {p.device for p in params} == {CUDA}
    assert model.table.device == CUDA
    assert model.to(CUDA) is model
    assert model.to("cuda:0") is model
    with pytest.raises(offload.UnsupportedError, match="cannot be moved"):
        model.to("cpu")
    model(tokens()).sum().backward()
    assert all(isinstance(p.grad, GradHandle) and p.grad.device == CUDA for p in params)
    assert params[0].grad is not None
    assert params[0].grad.clone().device == CUDA
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    assert norm.device == CUDA
    assert model.blocks[0].mix.weight.sum().device == CUDA
    assert {v.device.type for k, v in model.state_dict().items() if k != "table"} == {"cpu"}
    offload.unwrap(model)
    assert {p.device.type for p in params} == {"cpu"}
    assert {p.grad.device.type for p in params if p.grad is not None} == {"cpu"}
    assert model.table.device.type == "cpu"


def test_a_model_that_is_on_the_device_already(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = t.Stack().to(CUDA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    offload.wrap(model, policy(tmp_path))
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    offload.unwrap(model)
    for name, value in model.state_dict().items():
        assert value.device == CUDA
        assert torch.equal(value, before[name])


def test_values_written_on_the_device_come_home(tmp_path: Path) -> None:
    model = wrap(tmp_path)
    expected = {name: value * 1.25 for name, value in model.state_dict().items()}
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.25)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_are_loaded_to_the_device(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(1)
    values = {k: v.clone() for k, v in t.Stack().state_dict().items()}
    save_file(values, tmp_path / "model.safetensors")
    model = wrap(tmp_path)
    offload.load_weights(model, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_the_allocation_is_torchs_and_goes_with_the_model(tmp_path: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(CUDA)
    model = wrap(tmp_path)
    assert torch.cuda.memory_allocated(CUDA) - before >= 3 * UNIT
    model(tokens()).sum().backward()
    offload.unwrap(model)
    del model
    gc.collect()
    torch.cuda.synchronize(CUDA)
    assert torch.cuda.memory_allocated(CUDA) - before < UNIT


def test_a_budget_beyond_the_device_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = t.Stack()
    with pytest.raises(offload.BudgetError, match="are free; lower Budget"):
        offload.wrap(model, policy(tmp_path, device_bytes=1 << 44))
    assert model.head.weight.device.type == "cpu"
    with pytest.raises(offload.PolicyError, match="no such device"):
        offload.wrap(
            model,
            offload.Policy(offload.Budget(host="1GiB", device="1GiB"), device="cuda:99"),
        )


@pytest.mark.usefixtures("compared")
@pytest.mark.filterwarnings("ignore:.*AccumulateGrad node's stream")  # which it waits for
def test_streams_that_change_between_modules(tmp_path: Path) -> None:
    """Each block runs on another stream, after the one before; copies follow."""

    class Streams(t.Stack):
        def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            before = torch.cuda.current_stream(CUDA)
            now = torch.cuda.Stream(CUDA)
            now.wait_stream(before)
            with torch.cuda.stream(now):
                x.record_stream(now)
                y: torch.Tensor = block(x)
            before.wait_stream(now)
            y.record_stream(before)
            return y

    loop = t.Loop(steps=2, micro_batches=1)
    expected = t.plain(t.Stack, loop)
    model = wrap(tmp_path, Streams)
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(expected, t.train(model, optimizer, loop))
    assert tier_of(model).device.stats()["conflicts"] == 0
