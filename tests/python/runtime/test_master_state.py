"""What becomes of the fp32 masters: checkpoints, exchange with plain models, writes, refusals."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import Narrow, Odds, assert_state, odd_loss, policy_for, seeded
from torch import nn

import offload
from offload.optim import spill
from offload.tiers.unit import owner_of

BF16 = torch.bfloat16
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


class Net(nn.Module):
    """All fp32; what is frozen is a unit of its own."""

    def __init__(self, seed: int = 0, width: int = 192) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(32, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(6)
        )
        for block in self.blocks:
            block[0].requires_grad_(False)
        self.head = nn.Linear(width, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        y: torch.Tensor = self.head(x)
        return y


def wrapped(folder: Path, seed: int = 0, **options: Any) -> nn.Module:
    return offload.wrap(Net(seed), policy_for(Net, folder, **options))


def adamw(model: nn.Module) -> offload.AdamW:
    return offload.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        odd_loss(model, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def reloaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("swap", [True, False], ids=["spilled", "in-memory"])
@pytest.mark.parametrize("make", [Net, Odds])
def test_a_model_that_was_only_wrapped_comes_back_as_it_was(
    make: Callable[[], nn.Module], swap: bool, tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in seeded(make).state_dict().items()}
    budget = None if swap else 1 << 28
    model = offload.wrap(seeded(make), policy_for(make, tmp_path, budget))
    assert offload.report(model).plan.spills is swap
    assert_state(model.state_dict(), before)
    model.eval()  # batch norms change their buffers otherwise
    odd_loss(model, 0).backward()  # type: ignore[no-untyped-call]
    offload.unwrap(model)
    assert_state(dict(model.state_dict()), before)
    for name, param in model.named_parameters():
        assert type(param) is nn.Parameter
        assert param.grad is None or param.grad.dtype is param.dtype, name
    odd_loss(model, 0).backward()  # type: ignore[no-untyped-call]  # gradients add up


def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    model = wrapped(tmp_path)
    optimizer = adamw(model)
    steps(model, optimizer, 0, 2)
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert {v.dtype for v in saved["model"].values()} == {torch.float32}
    steps(model, optimizer, 2, 2)
    for optimizer_first in (False, True):
        resumed = wrapped(tmp_path, seed=5)
        resumed_optimizer = adamw(resumed)
        if optimizer_first:
            resumed_optimizer.load_state_dict(saved["optimizer"])
        resumed.load_state_dict(saved["model"])
        if not optimizer_first:
            resumed_optimizer.load_state_dict(saved["optimizer"])
        steps(resumed, resumed_optimizer, 2, 2)
        assert_state(resumed.state_dict(), model.state_dict())


def test_exchange_with_plain_fp32_training(tmp_path: Path) -> None:
    """A checkpoint is that of the fp32 model with torch's AdamW, in both directions."""
    plain = Net()
    theirs = torch.optim.AdamW((p for p in plain.parameters() if p.requires_grad), **ADAMW)
    steps(plain, theirs, 0, 2)
    model = wrapped(tmp_path, seed=5)
    optimizer = adamw(model)
    model.load_state_dict(reloaded(plain.state_dict()))
    optimizer.load_state_dict(reloaded(theirs.state_dict()))
    assert_state(model.state_dict(), plain.state_dict())
    reference = Narrow(plain, BF16, **ADAMW)
    ours = theirs.state_dict()
    reference.optimizer.load_state_dict(ours)
    for step in range(2, 4):
        for each in (model, reference):
            odd_loss(each, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    assert_state(model.state_dict(), reference.full_state())
    back = Net(seed=6)
    back.load_state_dict(model.state_dict())
    again = torch.optim.AdamW((p for p in back.parameters() if p.requires_grad), **ADAMW)
    again.load_state_dict(optimizer.state_dict())
    wanted = reference.optimizer.state.values()
    for found, expected in zip(again.state.values(), wanted, strict=True):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    steps(back, again, 4, 1)


def test_exchange_with_a_plain_bf16_model(tmp_path: Path) -> None:
    """The optimizer's state_dict has the masters, so it is enough for a model that is bf16."""
    model = wrapped(tmp_path)
    optimizer = adamw(model)
    steps(model, optimizer, 0, 2)
    half = Net(seed=5).to(BF16)
    half.load_state_dict(model.state_dict())
    plain = adamw(half)
    plain.load_state_dict(reloaded(optimizer.state_dict()))

    def loss(step: int) -> torch.Tensor:
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(step))
        return (half(x.to(BF16)).float() - x).square().mean()

    for step in range(2, 4):
        loss(step).backward()  # type: ignore[no-untyped-call]
        plain.step()
        plain.zero_grad()
    steps(model, optimizer, 2, 2)
    for name, param in model.named_parameters():
        assert torch.equal(param.detach().clone(), half.get_parameter(name)), name


def test_a_loaded_master_that_does_not_belong_to_the_parameter_is_not_kept(tmp_path: Path) -> None:
    model = wrapped(tmp_path)
    optimizer = adamw(model)
    steps(model, optimizer, 0, 1)
    state = reloaded(optimizer.state_dict())
    for entry in state["state"].values():
        entry["master"] += 1.0
    optimizer.load_state_dict(state)
    for name, param in model.named_parameters():
        assert torch.equal(model.state_dict()[name].to(BF16), param.detach().clone()), name


@pytest.mark.parametrize("budget", [None, 1 << 28], ids=["spilled", "in-memory"])
def test_what_is_written_to_a_parameter_becomes_the_master(
    budget: int | None, tmp_path: Path
) -> None:
    model = wrapped(tmp_path, budget=budget)
    optimizer = adamw(model)
    steps(model, optimizer, 0, 1)
    before = model.state_dict()
    names = ["blocks.1.2.weight", "blocks.1.0.weight"]  # trained, frozen
    for name in names:
        param = model.get_parameter(name)
        with torch.no_grad():
            param[0, :4] = 0.1
            param.mul_(1.0)  # which changes nothing
    with offload.materialize(model.blocks[2]) as block:
        block[0].weight.data[1, 1] = 0.2
        block[2].weight.data[1, 1] = 0.2
    after = model.state_dict()
    rounded = torch.tensor([0.1, 0.2]).to(BF16).float()
    for name in names:
        assert (after[name][0, :4] == rounded[0]).all()
        assert torch.equal(after[name][1:], before[name][1:])
    for name in ("blocks.2.0.weight", "blocks.2.2.weight"):
        assert after[name][1, 1] == rounded[1]
        assert torch.equal(after[name][2:], before[name][2:])
    odd_loss(model, 1).backward()  # type: ignore[no-untyped-call]
    model.get_parameter(names[0]).grad.zero_()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the update starts from the master
    optimizer.step()
    assert torch.equal(model.state_dict()[names[0]], after[names[0]])


def test_state_dict_while_an_update_is_pending_and_with_keep_vars(tmp_path: Path) -> None:
    model = wrapped(tmp_path)
    optimizer = adamw(model)
    reference = Narrow(Net(), BF16, **ADAMW)
    for each in (model, reference):
        odd_loss(each, 0).backward()  # type: ignore[no-untyped-call]
    reference.step()
    optimizer.step()
    assert offload.report(model).as_dict()["pending"] > 0
    assert_state(model.state_dict(), reference.full_state())
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is param for name, param in model.named_parameters())
    part = model.blocks[1].state_dict()
    assert torch.equal(part["0.weight"], reference.full_state()["blocks.1.0.weight"])


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[3][2].weight = self.blocks[0][2].weight

    expected = seeded(Tied).state_dict()
    model = offload.wrap(seeded(Tied), policy_for(Tied, tmp_path))
    found = model.state_dict()
    assert found["blocks.3.2.weight"] is found["blocks.0.2.weight"]
    assert_state(found, expected)
    model.load_state_dict(found)
    assert_state(model.state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("through", ["load_state_dict", "load_weights"])
def test_masters_come_from_what_is_loaded(through: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    values = {k: v.to(dtype) for k, v in Net(seed=9).state_dict().items()}
    if dtype is torch.float64:  # rounding twice is not rounding once
        values["head.bias"][:] = 1 + 2**-8 + 2**-30
    plain = Net(seed=3)
    plain.load_state_dict(values)
    model = wrapped(tmp_path, seed=3)
    optimizer = adamw(model)
    steps(model, optimizer, 0, 1)
    if through == "load_weights":
        save_file(values, tmp_path / "model.safetensors")
        offload.load_weights(model, tmp_path)
    else:
        model.load_state_dict(values)
    assert_state(model.state_dict(), plain.state_dict())
    for name, param in model.named_parameters():
        assert torch.equal(param.detach().clone(), plain.get_parameter(name).to(BF16)), name
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, 1, 1)
    assert_state(model.state_dict(), plain.state_dict())


def test_a_deferred_model(tmp_path: Path) -> None:
    with offload.deferred_init(tmp_path):
        model: nn.Module = Net()
    offload.wrap(model, policy_for(Net, tmp_path))
    assert_state(model.state_dict(), Net().state_dict())
    reference = Narrow(Net(), BF16, **ADAMW)
    odd_loss(reference, 0).backward()  # type: ignore[no-untyped-call]
    reference.step()
    steps(model, adamw(model), 0, 1)
    assert_state(model.state_dict(), reference.full_state())


def test_an_optimizer_made_before_wrap_keeps_its_state(tmp_path: Path) -> None:
    model: nn.Module = Net()
    optimizer = adamw(model)
    steps(model, optimizer, 0, 1)
    reference = Narrow(_fp32(model), BF16, **ADAMW)
    reference.optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    offload.wrap(model, policy_for(Net, tmp_path))
    for each in (model, reference):
        odd_loss(each, 1).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    reference.step()
    assert_state(model.state_dict(), reference.full_state())


def _fp32(model: nn.Module) -> nn.Module:
    copy = Net()
    copy.load_state_dict(model.state_dict())
    return copy


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int8, torch.complex64, "torch.bfloat16"]
)
def test_dtypes_that_are_refused(dtype: Any) -> None:
    with pytest.raises(offload.PolicyError, match="param_dtype"):
        offload.Policy(offload.Budget(host="1GiB"), param_dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn]
)
def test_parameters_that_are_refused(dtype: torch.dtype) -> None:
    model: nn.Module = Net()
    odd = torch.zeros(3, dtype=torch.float32).to(dtype)
    model.blocks[1].odd = nn.Parameter(odd, requires_grad=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    policy = offload.Policy(offload.Budget(host="1GiB"), param_dtype=BF16)
    with pytest.raises(offload.UnsupportedError, match=r"blocks\.1\.odd is torch\."):
        offload.wrap(model, policy)
    assert all(v.dtype is model.state_dict()[k].dtype for k, v in before.items())


def test_a_gradient_from_before_is_refused() -> None:
    model: nn.Module = Net()
    odd_loss(model, 0).backward()  # type: ignore[no-untyped-call]
    policy = offload.Policy(offload.Budget(host="1GiB"), param_dtype=BF16)
    with pytest.raises(offload.UnsupportedError, match="has a fp32 gradient"):
        offload.wrap(model, policy)
    model.zero_grad()
    offload.wrap(model, policy)


def test_optimizers_without_masters_are_refused(tmp_path: Path) -> None:
    model = wrapped(tmp_path)
    before = model.state_dict()
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(offload.UnsupportedError, match="keep nothing in fp32"):
        spill(torch.optim.NAdam, params)
    theirs = torch.optim.SGD(params, lr=1.0)
    theirs.step()  # nothing has a gradient
    odd_loss(model, 0).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(offload.UnsupportedError, match=r"SGD\.step\(\) would update .*bfloat16"):
        theirs.step()
    assert_state(model.state_dict(), before)
    adamw(model).step()
    offload.unwrap(model)
    theirs.step()  # it is fp32 again


def test_a_failed_wrap_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.tiers.mover import Mover

    model: nn.Module = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hold_new, held = Mover.hold_new, []

    def fail_later(self: Mover, slab: Any) -> None:
        held.append(slab)
        if len(held) == 9:
            raise offload.BudgetError("no more")
        hold_new(self, slab)

    policy = policy_for(Net, tmp_path)
    monkeypatch.setattr(Mover, "hold_new", fail_later)
    with pytest.raises(offload.BudgetError, match="no more"):
        offload.wrap(model, policy)
    monkeypatch.undo()
    assert_state(dict(model.state_dict()), before)
    assert all(owner_of(param) is None for param in model.parameters())
