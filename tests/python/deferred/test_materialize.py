"""materialize(): real tensors inside the block, and what was written is there after it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.tiers.unit import SpilledParameter

BUDGET = 16 << 20
TOKENS = torch.arange(12).view(1, 12)


def pair(tmp_path: Path, **policy: Any) -> tuple[Any, Any]:
    """A wrapped model, most of it spilled, and the same one in memory."""
    model = t.wrapped(t.Stack, tmp_path, BUDGET, **policy)
    torch.manual_seed(0)
    return model, t.Stack()


def spilled_block(model: Any) -> Any:
    return next(b for b in model.blocks if type(b.mix.weight) is SpilledParameter)


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    found = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(found[name], value), name


def test_parameters_are_real_tensors_inside_and_spilled_after(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    block = spilled_block(model)
    same = plain.blocks[list(model.blocks).index(block)]
    with offload.materialize(block) as found:
        assert found is block
        assert all(type(p) is nn.Parameter for p in block.parameters())
        assert torch.equal(block.mix.weight.data, same.mix.weight)
        assert block.mix.weight.data_ptr() != 0
        assert block.mix.weight.numpy(force=True).shape == (512, 256)
    assert type(block.mix.weight) is SpilledParameter


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.add_(1),
        lambda p: p.data.numpy().__setitem__(..., 3.0),
        lambda p: p.data[3].zero_(),
        lambda p: p.detach().mul_(2),
        lambda p: setattr(p, "data", p.data * 0.5),
    ],
    ids=["data", "numpy", "row", "detach", "replaced"],
)
def test_every_way_of_writing_is_kept(write: Any, tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    for ours, theirs in zip(model.blocks, plain.blocks, strict=True):
        with offload.materialize(ours):
            write(ours.out.weight)
        write(theirs.out.weight)
    for _ in range(2):  # the second pass reads what was evicted meanwhile
        assert torch.equal(model(TOKENS), plain(TOKENS))
    assert_same(model, plain)


def test_in_place_under_no_grad_and_a_pinned_unit(tmp_path: Path) -> None:
    model = t.wrapped(lambda: t.Stack(layers=2), tmp_path, 64 << 20)
    torch.manual_seed(0)
    plain = t.Stack(layers=2)
    for net in (model, plain):
        with offload.materialize(net.head), torch.no_grad():
            net.head.weight.mul_(3)
        with offload.materialize(net):
            net.scale.data = torch.full((256,), 2.0)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert_same(model, plain)


def test_a_module_that_fits_whole_is_held_whole(tmp_path: Path) -> None:
    model = t.wrapped(lambda: t.Stack(layers=2), tmp_path, 64 << 20)
    with offload.materialize(model), torch.no_grad():
        for param in model.parameters():
            param.fill_(0.25)
    assert all(bool((p == 0.25).all()) for p in model.parameters())


def test_a_model_that_does_not_fit_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    with pytest.raises(offload.BudgetError, match="this Stack cannot be in memory as a whole"):
        offload.materialize(model)
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_a_block_that_finds_the_ring_taken_is_refused_and_holds_nothing(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    blocks, held = list(model.blocks), []
    with pytest.raises(offload.BudgetError):  # noqa: PT012
        for block in blocks:
            held.append(offload.materialize(block))
            held[-1].__enter__()
    held.pop()
    while held:
        held.pop().__exit__(None, None, None)
    assert all(unit.holders == 0 for unit in model._offload_wrapped.context.units)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert_same(model, plain)


def test_pending_updates_are_finished_first_and_later_ones_see_the_change(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    ours = offload.AdamW(t.groups(model), lr=1e-2)
    theirs = torch.optim.AdamW(t.groups(plain), lr=1e-2, foreach=False)
    for _ in range(3):
        for net, optimizer in ((model, ours), (plain, theirs)):
            net(TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for number in (1, 4, 7):
            block, same = model.blocks[number], plain.blocks[number]
            with offload.materialize(block):
                assert torch.equal(block.mix.weight.data, same.mix.weight)
                block.mix.weight.data.mul_(0.9)
            same.mix.weight.data.mul_(0.9)
    assert_same(model, plain)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_step_inside_the_block_is_seen_there(lazy: bool, tmp_path: Path) -> None:
    model, plain = pair(tmp_path, lazy_step=lazy)
    ours = offload.AdamW(t.groups(model), lr=1e-2)
    theirs = torch.optim.AdamW(t.groups(plain), lr=1e-2, foreach=False)
    block, same = spilled_block(model), None
    same = plain.blocks[list(model.blocks).index(block)]
    with offload.materialize(block):
        for net, optimizer in ((model, ours), (plain, theirs)):
            net(TOKENS).square().mean().backward()
            optimizer.step()
        assert torch.equal(block.mix.weight.data, same.mix.weight)
        block.mix.weight.data.add_(1)
        same.mix.weight.data.add_(1)
        assert torch.equal(model(TOKENS), plain(TOKENS))
    assert_same(model, plain)


@pytest.mark.parametrize("how", ["materialize", "step inside", "no_grad", "load_state_dict"])
def test_master_copies_follow_the_change_and_keep_their_bits_elsewhere(
    how: str, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)]).to(torch.bfloat16)

    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = offload.wrap(
        make(), offload.Policy(offload.Budget(host="4MiB"), swap_dir=tmp_path, io_block_bytes=2**16)
    )
    optimizers = [offload.AdamW(net.parameters(), lr=1e-4) for net in (model, plain)]
    x = torch.rand(4, 256, dtype=torch.bfloat16)

    def step(net: nn.Module, optimizer: Any) -> None:
        net(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for net, optimizer in zip((model, plain), optimizers, strict=True):
        step(net, optimizer)
    before = optimizers[1].state_dict()
    if how == "no_grad":
        with torch.no_grad():
            model[5].weight[3] = 5.0
    elif how == "load_state_dict":
        state = model.state_dict()
        state["5.weight"][3] = 5.0
        model.load_state_dict(state)
    else:
        with offload.materialize(model[5]) as layer:
            layer.weight.data[3] = 5.0
            if how == "step inside":
                step(model, optimizers[0])
    with torch.no_grad():  # the reference: the master copy is set by hand
        plain[5].weight[3] = 5.0
        before["state"][10]["master"][3] = 5.0
    optimizers[1].load_state_dict(before)
    if how != "step inside":
        step(model, optimizers[0])
    step(plain, optimizers[1])
    assert_same(model, plain)
    found, expected = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number in expected:
        for name, value in expected[number].items():
            assert torch.equal(torch.as_tensor(found[number][name]), torch.as_tensor(value))


def test_blocks_nest_and_overlap(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    block = spilled_block(model)
    same = plain.blocks[list(model.blocks).index(block)]
    outer = offload.materialize(block)
    with outer, outer:
        with offload.materialize(block.mix):
            block.mix.weight.data.add_(1)
        assert type(block.mix.weight) is nn.Parameter
        block.mix.weight.data.add_(1)
        model(TOKENS)
        assert type(block.mix.weight) is nn.Parameter
    same.mix.weight.data.add_(1).add_(1)
    assert_same(model, plain)


def test_inside_a_forward(tmp_path: Path) -> None:
    class Reads(t.Stack):
        def run(self, block: Any, x: torch.Tensor) -> torch.Tensor:
            with offload.materialize(block.out) as out:
                scale = out.weight.data.abs().max().item()
            y: torch.Tensor = block(x) * scale
            return y

    loop = t.Loop(steps=2)
    t.assert_same(t.plain(Reads, loop), t.offloaded(Reads, loop, tmp_path, BUDGET))


def test_a_graph_made_inside_is_differentiated_after(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    block = spilled_block(model)
    same = plain.blocks[list(model.blocks).index(block)]
    with offload.materialize(block):
        loss = block.mix.weight.square().sum()
    loss.backward()
    same.mix.weight.square().sum().backward()
    assert torch.equal(block.mix.weight.grad, same.mix.weight.grad)
    with offload.materialize(block):  # only read: the graph below stays valid
        loss = block.mix.weight.square().sum()
    with offload.materialize(block):
        block.mix.weight.sum()
    loss.backward()
    with offload.materialize(block), torch.no_grad():
        loss = block(torch.rand(1, 256)).sum()
    with offload.materialize(block):
        loss = block.mix.weight.square().sum()
        with torch.no_grad():
            block.mix.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an"):
        loss.backward()


def test_an_exception_inside_keeps_what_was_written(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    with pytest.raises(ValueError, match="shape"), offload.materialize(model.blocks[2]) as block:
        block.mix.bias.data.fill_(2).numpy()[:] = [1, 2]
    plain.blocks[2].mix.bias.data.fill_(2)
    assert_same(model, plain)


def test_an_interrupted_forward_inside_does_not_end_the_hold(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    block = spilled_block(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with offload.materialize(block):
        handle = model.blocks[9].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(TOKENS)
        handle.remove()
        assert torch.equal(model(TOKENS), plain(TOKENS))
        assert type(block.mix.weight) is nn.Parameter
        block.mix.weight.data.zero_()
    plain.blocks[list(model.blocks).index(block)].mix.weight.data.zero_()
    assert_same(model, plain)


def test_data_of_another_shape_is_refused_at_the_end_and_changes_nothing(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    block = model.blocks[2]
    refused = pytest.raises(offload.UnsupportedError, match=r"blocks\.2\.mix\.bias")
    with refused, offload.materialize(block):
        block.mix.bias.data = torch.zeros(1)
    assert_same(model, plain)


def test_threads_may_hold_different_blocks(tmp_path: Path) -> None:
    model, plain = pair(tmp_path)
    errors: list[BaseException] = []

    def work(numbers: range) -> None:
        try:
            for _ in range(5):
                for number in numbers:
                    with offload.materialize(model.blocks[number]) as block:
                        block.out.weight.data.mul_(0.5)
        except BaseException as error:  # noqa: BLE001  (reported below)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(n, 10, 2),)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for block in plain.blocks:
        block.out.weight.data.mul_(0.5**5)
    assert_same(model, plain)


def test_a_module_in_memory_comes_back_as_it_is() -> None:
    linear = nn.Linear(4, 4)
    with offload.materialize(linear) as found:
        assert found is linear
