"""Experts in one parameter: those that no token is routed to are not moved, and never read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fused as f
import pytest
import torch
import training as t
from fused import EXPERTS, Experts, Reads, Sparse
from interrupter import interrupted
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import Loop

import offload
from offload.runtime.discover import find_units
from offload.runtime.precision import compute_dtypes
from offload.tiers.blocks import SlabBlocks
from offload.tiers.flights import Flights
from offload.tiers.mover import Mover
from offload.tiers.reads import begin_partial
from offload.tiers.slab import Residency
from offload.tiers.unit import Unit

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")
poisoned = f.poisoned

TOKENS = torch.arange(12).view(2, 6)


def batched() -> nn.Module:
    return Sparse(batched=True)


def seeded(make: Callable[[], nn.Module] = Sparse) -> Any:
    torch.manual_seed(0)
    return make()


def names(model: nn.Module, named: list[str] | None = None) -> list[str]:
    return [u.name for u in find_units(model, named, 1 << 30, compute_dtypes(model, None)).units]


@pytest.mark.own_device
def test_experts_in_parameters_are_a_unit_of_their_own(tmp_path: Path) -> None:
    layer = [f"layers.0.{name}" for name in ("norm", "router", "experts")]
    assert names(Sparse(layers=1)) == ["embed", *layer, "head"]
    assert names(Sparse(layers=1), ["layers.0"]) == ["embed", "layers.0", "head"]
    alone = nn.Sequential()
    alone.inner = nn.Module()
    alone.inner.experts = Experts()
    assert names(alone) == ["inner.experts"]
    context = f.wrap(seeded(), tmp_path)
    assert [u.name for u in f.by_row(context)] == [f"layers.{i}.experts" for i in range(4)]
    rows = {p.name.split(".")[-1]: p.rows for p in f.by_row(context)[0].params}
    assert rows == dict.fromkeys(("gate_up_proj", "gate_up_bias", "down_proj"), EXPERTS)


def test_what_only_looks_like_experts_stays_in_its_block() -> None:
    for change in ({"num_experts": EXPERTS + 1}, {"num_experts": 2.0}, {"forward": nn.Identity()}):
        model = Sparse(layers=1)
        for name, value in change.items():
            model.layers[0].experts.__dict__[name] = value
        assert names(model) == ["embed", "layers.0", "head"], change


@pytest.mark.parametrize("make", [Sparse, batched])
@pytest.mark.parametrize("allowed", [(), (1, 4)])
@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"activations": "disk", "activation_bytes": 12 << 20},
        {"activations": "recompute", "activation_bytes": 12 << 20},
        {"step_in_backward": True},
        {"lazy_step": False},
    ],
    ids=str,
)
def test_training_is_exact(
    make: Callable[[], nn.Module], allowed: tuple[int, ...], policy: dict[str, Any], tmp_path: Path
) -> None:
    in_backward = policy.pop("step_in_backward", False)
    loop = Loop(
        steps=3,
        micro_batches=1 if in_backward else 2,
        clip=None if in_backward else 0.3,
        grads=not in_backward,
    )

    def routed() -> nn.Module:
        model = make()
        model.route(*allowed)
        return model

    expected = t.plain(routed, loop)
    torch.manual_seed(0)
    model = routed()
    f.wrap(model, tmp_path, 1 << 20, **policy)
    options = {"step_in_backward": True} if in_backward else {}
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1, **options)
    t.assert_same(expected, t.train(model, optimizer, loop))


@pytest.mark.own_device
@pytest.mark.parametrize("make", [Sparse, batched])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_reads_the_blocks_of_the_routed_experts(
    make: type[Sparse],
    mode: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, model = seeded(make), seeded(make)
    context = f.wrap(model, tmp_path)
    reads = Reads(context, monkeypatch)
    for rows in ((1, 4), (1, 2), (0, 5)):
        f.give_up(context)
        for m in (plain, model):
            m.route(*rows)
        with mode():
            assert torch.equal(model(TOKENS), plain(TOKENS))
        assert f.unread_is_poisoned(f.by_row(context)[-1], *rows)
        reads.assert_of(*rows)


@pytest.mark.own_device
def test_rows_that_are_there_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = (seeded(lambda: Sparse(layers=2)) for _ in range(2))
    context = f.wrap(model, tmp_path)
    assert len(f.by_row(context)) == 2
    f.give_up(context)
    reads = Reads(context, monkeypatch)
    for rows in ((0, 1), (1, 0), (3, 4), (0, 4)):
        for m in (plain, model):
            m.route(*rows)
        with torch.no_grad():
            assert torch.equal(model(TOKENS), plain(TOKENS))
        if rows == (0, 1):
            first = {name: set(blocks) for name, blocks in reads.blocks.items()}
            reads.assert_of(0, 1)
        elif rows == (3, 4):  # some of whose blocks were read with 0 and 1
            assert all(not blocks & first[name] for name, blocks in reads.blocks.items())
            assert reads.blocks
            reads.blocks.clear()
        else:
            assert not reads.blocks
    assert f.by_row(context)[0].param_slab.residency is Residency.PARTIAL


@pytest.mark.own_device
@pytest.mark.parametrize("make", [Sparse, batched])
def test_a_backward_reads_the_rows_of_its_forwards(
    make: type[Sparse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = seeded(make), seeded(make)
    context = f.wrap(model, tmp_path)
    losses, expected = [], []
    for rows in ((1, 4), (2, 1)):
        for m in (plain, model):
            m.route(*rows)
        expected.append(plain(TOKENS).square().mean())
        losses.append(model(TOKENS).square().mean())
    assert [a.item() for a in losses] == [b.item() for b in expected]
    f.give_up(context)
    reads = Reads(context, monkeypatch)
    sum(losses).backward()
    sum(expected).backward()
    # What is gathered by an index is a copy, which autograd saves.
    reads.assert_of(*(() if make is batched else (1, 2, 4)))
    assert_same_grads(model, plain)


def assert_same_grads(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad.clone(), other.grad), name


@pytest.mark.own_device
def test_only_experts_that_were_all_used_are_read_ahead_of_a_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = Sparse(), torch.arange(64).view(2, 32)
    context = f.wrap(model, tmp_path)
    units, misses = f.by_row(context), []
    with torch.no_grad():
        for rows in ((), (1, 4)):
            model.route(*rows)
            for _ in range(3):
                f.give_up(context)
                before = context.mover.misses
                model(tokens)
                misses.append(context.mover.misses - before)
            routed = None if not rows else frozenset(rows)
            assert [unit.routed for unit in units] == [routed] * len(units)
    assert misses[2] < len(units)
    assert misses[-1] == len(units)


class Checkpointed(Sparse):
    reentrant = False

    def run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(layer, x, use_reentrant=self.reentrant)
        return y


class CheckpointedReentrant(Checkpointed):
    reentrant = True


@pytest.mark.own_device
@pytest.mark.parametrize("make", [Checkpointed, CheckpointedReentrant])
def test_a_recomputation_reads_the_rows_that_it_is_routed_to(
    make: type[Sparse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = seeded(make), seeded(make)
    context = f.wrap(model, tmp_path)
    for m in (plain, model):
        m.route(0, 5)
    loss, expected = model(TOKENS).square().mean(), plain(TOKENS).square().mean()
    f.give_up(context)
    reads = Reads(context, monkeypatch)
    loss.backward()
    expected.backward()
    reads.assert_of(0, 5)
    assert_same_grads(model, plain)


def reads_all(experts: Experts) -> torch.Tensor:
    return experts.gate_up_proj.sum()


def reads_a_slice_of_a_view(experts: Experts) -> torch.Tensor:
    return experts.down_proj.transpose(1, 2)[2:4].sum()


def reads_by_mask(experts: Experts) -> torch.Tensor:
    return experts.down_proj[torch.arange(EXPERTS) % 2 == 0].sum()


def reads_from_the_end(experts: Experts) -> torch.Tensor:
    return experts.down_proj[torch.tensor([-1, 0])].sum()


def reads_without_operators(experts: Experts) -> torch.Tensor:
    return torch.tensor(experts.down_proj.detach().numpy()[3].sum())


def writes_in_place(experts: Experts) -> torch.Tensor:
    with torch.no_grad():
        experts.down_proj[:, 0].mul_(1.5)
        experts.gate_up_proj[2].add_(experts.gate_up_proj[3])
    return torch.zeros(())


def replaces_data(experts: Experts) -> torch.Tensor:
    experts.gate_up_bias.data = experts.gate_up_bias.data * 2
    return torch.zeros(())


@pytest.mark.parametrize(
    "inside",
    [
        reads_all,
        reads_a_slice_of_a_view,
        reads_by_mask,
        reads_from_the_end,
        reads_without_operators,
        writes_in_place,
        replaces_data,
    ],
)
def test_rows_that_the_call_did_not_name_are_fetched_before_they_are_used(
    inside: Callable[[Experts], torch.Tensor], tmp_path: Path
) -> None:
    plain, model = seeded(), seeded()
    context = f.wrap(model, tmp_path)
    for m in (plain, model):
        m.route(1, 4)
        found: list[torch.Tensor] = []
        m.extra = found
        for layer in m.layers:
            layer.experts.inside = lambda experts, found=found: found.append(inside(experts))
    for _ in range(2):
        f.give_up(context)
        losses, trained = [], False
        for m in (plain, model):
            m.extra.clear()
            losses.append(m(TOKENS).square().mean() + sum(value * 0.5 for value in m.extra))
        assert losses[0].item() == losses[1].item()
        f.give_up(context)
        for loss in losses:
            if inside not in (writes_in_place, replaces_data):  # which a backward refuses
                loss.backward()
                trained = True
        if trained:
            assert_same_grads(model, plain)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.clone(), theirs)
        model.zero_grad()
        plain.zero_grad()


@pytest.mark.own_device
def test_another_thread_that_looks_at_a_parameter_sees_all_of_it(tmp_path: Path) -> None:
    plain, model = seeded(), seeded()
    context = f.wrap(model, tmp_path)
    model.route(1, 4)
    expected = plain.layers[2].experts.down_proj.norm().item()
    found = []

    def look(experts: Experts) -> None:
        def run() -> None:
            found.append(experts.down_proj.norm().item())

        thread = threading.Thread(target=run)
        assert f.by_row(context)[2].param_slab.residency is Residency.PARTIAL
        thread.start()
        thread.join()

    model.layers[2].experts.inside = look
    f.give_up(context)
    model(TOKENS).sum().backward()
    assert found == [expected]


def test_a_hook_of_the_user_may_change_the_routing(tmp_path: Path) -> None:
    plain, model = seeded(), seeded()
    context = f.wrap(model, tmp_path)

    def reroute(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0], (args[1] + 1) % EXPERTS

    for m in (plain, model):
        m.route(1, 4)
        m.layers[1].experts.register_forward_pre_hook(reroute)
    f.give_up(context)
    outputs = [m(TOKENS).square().mean() for m in (plain, model)]
    assert outputs[0].item() == outputs[1].item()
    for output in outputs:
        output.backward()
    assert_same_grads(model, plain)


@pytest.mark.own_device
@pytest.mark.parametrize("make", [Sparse, batched])
def test_numbers_beyond_the_last_expert_are_of_other_processes(
    make: type[Sparse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = seeded(make), seeded(make)
    context = f.wrap(model, tmp_path)
    hidden = torch.randn(3, f.WIDTH)
    reads = Reads(context, monkeypatch)
    for index in ([[1, 6], [6, 1], [6, 6]], [[6, 6], [6, 6], [6, 6]]):
        f.give_up(context)
        args = hidden, torch.tensor(index), torch.full((3, 2), 0.5)
        for i in range(2):
            ours, theirs = (m.layers[i].experts(*args) for m in (model, plain))
            assert torch.equal(ours, theirs)
        if make is Sparse:  # the other one reads the last row in place of them
            assert f.unread_is_poisoned(f.by_row(context)[0], 1)
            assert bool(reads.blocks) is (index[0][0] == 1)
        reads.blocks.clear()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("grad", [True, False])
def test_training_goes_on_after_a_forward_that_did_not_end(
    error: type[BaseException], grad: bool, tmp_path: Path
) -> None:
    loop = Loop(steps=2, micro_batches=2)
    expected = t.plain(Sparse, loop)
    model = seeded()
    context = f.wrap(model, tmp_path)

    def fail(experts: Experts) -> None:
        raise error

    model.layers[1].experts.inside = fail
    with pytest.raises(error), torch.set_grad_enabled(grad):
        model(TOKENS)
    model.layers[1].experts.inside = lambda experts: None
    with torch.no_grad():
        model(TOKENS)
    f.give_up(context)
    assert not context.scopes.mine
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(expected, t.train(model, optimizer, loop))


@pytest.mark.own_device
def test_all_of_it_is_there_for_whoever_needs_it_after_a_part_was(tmp_path: Path) -> None:
    plain, model = seeded(), seeded()
    context = f.wrap(model, tmp_path)
    model.route(1, 4)

    def part() -> None:
        f.give_up(context)
        with torch.no_grad():
            model(TOKENS)
        assert f.by_row(context)[-1].param_slab.residency is Residency.PARTIAL

    assert f.by_row(context)[-1].name == "layers.3.experts"
    weights = plain.state_dict()
    part()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    part()
    with offload.materialize(model.layers[3].experts) as experts:
        assert torch.equal(experts.down_proj, plain.layers[3].experts.down_proj)
        with torch.no_grad():
            experts.down_proj[2] += 1.0
            plain.layers[3].experts.down_proj[2] += 1.0
            model(TOKENS)
    part()
    with torch.no_grad():
        model.layers[3].experts.gate_up_proj.mul_(2.0)
        plain.layers[3].experts.gate_up_proj.mul_(2.0)
    part()
    offload.unwrap(model)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_an_update_after_a_part_was_there_changes_all_of_it(rule: str, tmp_path: Path) -> None:
    plain, model = seeded(), seeded()
    f.wrap(model, tmp_path)
    theirs = getattr(torch.optim, rule)(plain.parameters(), lr=1e-2, foreach=False)
    ours = getattr(offload.optim, rule)(model.parameters(), lr=1e-2)
    for rows in ((1, 4), (0, 3), (1, 4)):
        for m, optimizer in ((plain, theirs), (model, ours)):
            m.route(*rows)
            m(TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.clone(), other), name


def test_masters_of_experts_are_exact(tmp_path: Path) -> None:
    def outputs(model: nn.Module, optimizer: Any) -> list[float]:
        losses = []
        for rows in ((1, 4), (0, 3), (1, 4)):
            model.route(*rows)
            loss = model(TOKENS).float().square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    found = []
    for budget in (0, 1 << 30):
        model = seeded()
        f.wrap(model, tmp_path, budget, param_dtype=torch.bfloat16)
        found.append(outputs(model, offload.AdamW(model.parameters(), lr=1e-2)))
        weights = model.state_dict()
        found.append([value.double().sum().item() for value in weights.values()])
    assert found[:2] == found[2:]


@pytest.mark.own_device
def test_frozen_experts_are_read_from_their_file_row_by_row(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    plain, model = seeded(), seeded()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    for m in (plain, model):
        for name, param in m.named_parameters():
            param.requires_grad_("experts" not in name)
    offload.load_weights(model, tmp_path / "model.safetensors", frozen="file")
    context = f.wrap(model, tmp_path)
    units = f.by_row(context)
    assert units
    assert all(unit.param_slab.source is not None for unit in units)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, foreach=False)
    ours = offload.optim.SGD(model.parameters(), lr=0.1)
    f.give_up(context)
    for rows in ((1, 4), (0, 3)):
        before = context.files().bytes_read
        losses = []
        for m, optimizer in ((plain, theirs), (model, ours)):
            m.route(*rows)
            loss = m(TOKENS).square().mean()
            f.give_up(context)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        f.give_up(context)
        assert losses[0] == losses[1]
        read = context.files().bytes_read - before
        assert read == 2 * sum(file_blocks(unit, *rows) for unit in units)  # and the backward
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.clone(), other)


def file_blocks(unit: Unit, *rows: int) -> int:
    """The bytes of the blocks of a file that `rows` lie in, each of one parameter."""
    nbytes = 0
    for param in unit.params:
        blocks = SlabBlocks.of_size(param.nbytes, f.BLOCK)
        ranges = [(a - param.offset, b - param.offset) for a, b in param.ranges(rows)]
        nbytes += sum(b - a for a, b in blocks.spans(blocks.missing(ranges)))
    return nbytes


@pytest.mark.own_device
def test_a_read_that_fails_leaves_the_rows_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = (seeded(lambda: Sparse(layers=2)) for _ in range(2))
    context = f.wrap(model, tmp_path)
    f.give_up(context)
    for m in (plain, model):
        m.route(0, 1)
    with torch.no_grad():
        model(TOKENS)
    slab = f.by_row(context)[1].param_slab
    with context.lock:
        swap_object, slab.swap_object = slab.swap_object, 1 << 40  # there is none
        model.route(4, 5)
        with pytest.raises(offload.OffloadError), torch.no_grad():
            model(TOKENS)
        slab.swap_object = swap_object
    assert slab.residency is Residency.PARTIAL
    reads = Reads(context, monkeypatch)
    model.route(0, 1)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS))
    reads.assert_of()
    for m in (plain, model):
        m.route(4, 5)
    assert torch.equal(model(TOKENS), plain(TOKENS))


TRACED = (Mover._start_missing, Mover._start_read, Flights.start, Flights.note, begin_partial)


@pytest.mark.own_device
def test_no_row_is_taken_for_read_after_ctrl_c_on_any_line_of_its_read(tmp_path: Path) -> None:
    plain, model = (seeded(lambda: Sparse(layers=2)) for _ in range(2))
    context = f.wrap(model, tmp_path)
    f.give_up(context)

    def use() -> None:
        with torch.no_grad():
            model(TOKENS)

    came = []
    for line in range(0, 200, 3):
        for rows in ((0, 1), (3, 4)):  # from nothing, and beside what is there
            model.route(*rows)
            came.append(interrupted(TRACED, line, use))
            plain.route(*rows)
            with torch.no_grad():
                assert torch.equal(model(TOKENS), plain(TOKENS)), (line, rows)
        f.give_up(context)
    assert came[0]
    assert not came[-1]
