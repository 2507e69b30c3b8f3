"""16-bit parameters with fp32 copies, and states in bfloat16 and int8."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import family as f
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from offload import UnsupportedError
from offload.optim import memory_update

EACH_RULE = pytest.mark.parametrize(("name", "kwargs"), f.RULES, ids=f.RULE_IDS)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
EACH_NARROW_RULE = pytest.mark.parametrize(("name", "kwargs"), f.NARROW_RULES, ids=f.RULE_IDS)
NARROW = pytest.mark.parametrize("state_format", ["bfloat16", "int8"])
STEPS = 4


class MasterReference:
    """torch's rule on fp32 copies of the parameters, with their gradients widened."""

    def __init__(self, name: str, model: nn.Module, **kwargs: Any) -> None:
        self.model = model
        self.masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
        self.optimizer = f.reference(name, self.masters, **kwargs)

    def step(self) -> None:
        for param, master in zip(self.model.parameters(), self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        self.optimizer.step()
        for param, master in zip(self.model.parameters(), self.masters, strict=True):
            if param.grad is not None:
                param.detach().copy_(master.detach())


def placed(
    place: str, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    if place == "wrapped":
        return f.wrapped(f.Model(dtype), folder), {}
    return f.Model(dtype), {} if place == "memory" else {"policy": f.disk_policy(folder)}


def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        f.set_gradients(step, model)
        optimizer.step()


@HALF
@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
@EACH_RULE
def test_master_copies_are_torchs_rule_in_fp32(
    name: str, kwargs: dict[str, Any], place: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = f.Model(dtype)
    ours, where = placed(place, tmp_path, dtype)
    optimizer = f.make(name, ours.parameters(), **kwargs, **where)
    real = MasterReference(name, theirs, **kwargs)
    for step in range(STEPS):
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
        f.assert_same(ours, theirs)
    saved = optimizer.state_dict()
    f.assert_same_state(saved, real.optimizer.state_dict(), extra=["master"])
    for key, master in enumerate(real.masters):
        if key in saved["state"] and "master" in saved["state"][key]:
            assert f.same_bits(saved["state"][key]["master"], master)


@HALF
@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
def test_masters_are_resumed_and_rebuilt(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = f.Model(dtype)
    ours, where = placed(place, tmp_path, dtype)
    optimizer = f.make("AdamW", ours.parameters(), **where)
    real = MasterReference("AdamW", theirs)
    for step in range(2):
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
    saved = optimizer.state_dict()
    optimizer = f.make("AdamW", ours.parameters(), **where)
    optimizer.load_state_dict(saved)
    for step in range(2, 4):
        f.set_gradients(step, ours, theirs)
        optimizer.step()
        real.step()
    f.assert_same(ours, theirs)
    # A state without masters, as torch's: they are the parameters, widened.
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.pop("master", None)
    optimizer.load_state_dict(saved)
    for param, master in zip(f.values(theirs), real.masters, strict=True):
        master.data.copy_(param)
    f.set_gradients(4, ours, theirs)
    optimizer.step()
    real.step()
    f.assert_same(ours, theirs)


def test_a_torch_state_of_16_bit_parameters_can_be_loaded() -> None:
    ours, theirs = f.Model(torch.bfloat16), f.Model(torch.bfloat16)
    real = f.reference("AdamW", theirs.parameters())
    run(theirs, real, range(2))
    optimizer = f.make("AdamW", ours.parameters())
    optimizer.load_state_dict(real.state_dict())
    assert optimizer.state[next(iter(ours.parameters()))]["exp_avg"].dtype is torch.float32
    run(ours, optimizer, range(2, 3))
    back = f.reference("AdamW", theirs.parameters())
    back.load_state_dict(optimizer.state_dict())
    run(theirs, back, range(3, 4))


@NARROW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@EACH_NARROW_RULE
def test_the_same_bits_wherever_the_state_lives(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype, state_format: Any, tmp_path: Path
) -> None:
    expected: tuple[nn.Module, dict[str, Any]] | None = None
    for place in ("memory", "disk", "wrapped"):
        (tmp_path / place).mkdir()
        model, where = placed(place, tmp_path / place, dtype)
        optimizer = f.make(
            name, model.parameters(), state_format=state_format, seed=7, **kwargs, **where
        )
        run(model, optimizer, range(STEPS))
        if expected is None:
            expected = model, optimizer.state_dict()
        f.assert_same(model, expected[0])
        f.assert_same_state(optimizer.state_dict(), expected[1])


@pytest.mark.parametrize("state_format", ["float32", "bfloat16", "int8"])
def test_bits_do_not_depend_on_the_threads(
    state_format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on which parameters are handed to them."""
    models = []
    for threads, small in ((1, 0), (2, 1 << 14), (5, 100), (3, 1 << 30)):
        monkeypatch.setattr(memory_update, "cpu_share", lambda threads=threads: threads)
        monkeypatch.setattr(memory_update, "SMALL", small)
        model = f.Model(scale=200)  # a few chunks each
        optimizer = f.make("AdamW", model.parameters(), state_format=state_format)
        run(model, optimizer, range(3))
        models.append(model)
    for model in models[1:]:
        f.assert_same(model, models[0])


def test_seeds_are_reproducible_and_matter() -> None:
    states = []
    for seed in (0, 0, 1):
        model = f.Model()
        optimizer = f.make("AdamW", model.parameters(), state_format="bfloat16", seed=seed)
        run(model, optimizer, range(1))
        states.append(optimizer.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert torch.allclose(states[0], states[2], rtol=2**-7)  # neighbours


@NARROW
@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
@EACH_NARROW_RULE
def test_resuming_is_exact(
    name: str, kwargs: dict[str, Any], place: str, state_format: Any, tmp_path: Path
) -> None:
    models = []
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        folder.mkdir()
        model, where = placed(place, folder)
        arguments = {"state_format": state_format, "seed": 3, **kwargs, **where}
        optimizer = f.make(name, model.parameters(), **arguments)
        run(model, optimizer, range(3))
        if resumed:
            saved = optimizer.state_dict()
            optimizer = f.make(name, model.parameters(), **arguments)
            optimizer.load_state_dict(saved)
            f.assert_same_state(optimizer.state_dict(), saved)
        run(model, optimizer, range(3, 6))
        models.append(model)
    f.assert_same(*models)


@NARROW
def test_a_changed_state_is_what_is_loaded(state_format: Any) -> None:
    """Not the codes that lie beside it."""
    model = f.Model()
    optimizer = f.make("AdamW", model.parameters(), state_format=state_format)
    run(model, optimizer, range(1))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"] * -2
    optimizer.load_state_dict(saved)
    for key, state in optimizer.state_dict()["state"].items():
        expected = saved["state"][key]["exp_avg"]
        if expected.numel():
            near = expected.abs().max().item() / 50
            assert torch.allclose(state["exp_avg"], expected, rtol=0.1, atol=near)


@NARROW
@EACH_NARROW_RULE
def test_torch_can_go_on_from_a_narrow_state(
    name: str, kwargs: dict[str, Any], state_format: Any
) -> None:
    model = f.Model()
    optimizer = f.make(name, model.parameters(), state_format=state_format, **kwargs)
    run(model, optimizer, range(3))
    twin = deepcopy(model)
    real = f.reference(name, model.parameters(), **kwargs)
    wide = f.make(name, twin.parameters(), **kwargs)
    for each in (real, wide):
        each.load_state_dict(optimizer.state_dict())
    f.set_gradients(3, model, twin)
    real.step()
    wide.step()
    f.assert_same(twin, model)
    stepped, expected = real.state_dict(), wide.state_dict()["state"]
    optimizer.load_state_dict(stepped)
    found = optimizer.state_dict()["state"]
    for key, state in expected.items():
        for what, value in state.items():
            assert f.same_bits(stepped["state"][key][what], value), (key, what)
            if value.numel():  # what torch kept of the codes is of before its step
                near = value.abs().max().item() / 50
                assert torch.allclose(found[key][what], value, rtol=0.1, atol=near), (key, what)
    run(model, optimizer, range(4, 5))


@NARROW
def test_training_goes_where_fp32_goes(state_format: Any) -> None:
    """Within 1% after 60 steps; the convergence runs of the benchmarks show more."""
    losses = {}
    for chosen in ("float32", state_format):
        model = f.net()
        optimizer = f.make("AdamW", model.parameters(), lr=3e-3, state_format=chosen)
        for step in range(60):
            optimizer.zero_grad()
            loss = f.loss_of(model, step % 4)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses[chosen] = loss.item()
    assert losses["float32"] < 2.0
    assert losses[state_format] == pytest.approx(losses["float32"], abs=0.04)


@NARROW
def test_narrow_states_take_less_memory(state_format: Any) -> None:
    model = f.Model()
    optimizer = f.make("AdamW", model.parameters(), state_format=state_format)
    run(model, optimizer, range(1))
    state = optimizer.state[next(iter(model.parameters()))]
    nbytes = sum(value.nbytes for key, value in state.items() if key != "step")
    numel = next(iter(model.parameters())).numel()
    assert nbytes / numel == pytest.approx(4 if state_format == "bfloat16" else 2, rel=0.02)


@HALF
def test_16_bit_models_train_wrapped_as_they_do_plain(dtype: torch.dtype, tmp_path: Path) -> None:
    """With clipping, accumulation and norms in fp32: units of several dtypes."""
    models = []
    for place in ("memory", "wrapped"):
        model = f.net(dtype)
        for block in model.blocks:
            block.norm.float()
        _run_norms_in_fp32(model, dtype)
        if place == "wrapped":
            f.wrapped(model, tmp_path)
        optimizer = f.make("AdamW", model.parameters(), lr=1e-2, state_format="int8")
        for step in range(4):
            for micro in range(2):
                f.loss_of(model, 2 * step + micro).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 1)
        models.append(model)
    f.assert_same(*models)


def _run_norms_in_fp32(model: f.Net, dtype: torch.dtype) -> None:
    for block in model.blocks:
        block.norm.register_forward_pre_hook(lambda m, args: args[0].float())
        block.norm.register_forward_hook(lambda m, args, out: out.to(dtype))


@NARROW
def test_rmsprop_refuses_what_could_give_a_negative_variance(state_format: Any) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    why = f"centered=True with state_format='{state_format}'.*use state_format='float32'"
    with pytest.raises(UnsupportedError, match=why):
        f.make("RMSprop", params, centered=True, state_format=state_format)
    optimizer = f.make("RMSprop", params[:1], state_format=state_format)
    with pytest.raises(UnsupportedError, match=why):
        optimizer.add_param_group({"params": params[1:], "centered": True})
    assert len(optimizer.param_groups) == 1
    saved = f.make("RMSprop", params[:1], centered=True).state_dict()
    with pytest.raises(UnsupportedError, match=why):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("place", ["memory", "disk", "wrapped"])
def test_a_master_that_no_update_reached_is_the_parameter(place: str, tmp_path: Path) -> None:
    model, where = placed(place, tmp_path, torch.bfloat16)
    expected = f.values(model)
    optimizer = f.make("AdamW", model.parameters(), **where)
    f.set_gradients(0, model, missing=False)
    optimizer._begin(optimizer._collect())  # type: ignore[attr-defined]
    for number, state in optimizer.state_dict()["state"].items():
        assert f.same_bits(state["master"], expected[number].float()), number
