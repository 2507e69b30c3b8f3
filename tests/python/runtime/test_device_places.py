"""Planned places on the device: in use from the second step on, exact whatever the order is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.runtime.wrapped import wrapped
from offload.tiers.device_places import DevicePlaces
from offload.tiers.device_tier import DeviceTier
from offload.tiers.slab import Slab

pytestmark = pytest.mark.own_device
TOKENS = torch.arange(24).view(2, 12)


class Mixed(nn.Module):
    """Blocks of three sizes between an embedding and a head that are larger, in any order."""

    def __init__(self, layers: int = 9, vocab: int = 400, widths: tuple[int, ...] = (1, 2, 3)):
        super().__init__()
        self.embed = nn.Embedding(vocab, 64)
        hidden = [64 * widths[i % len(widths)] for i in range(layers)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, n), nn.GELU(), nn.Linear(n, 64))
            for n in hidden
        )
        self.head = nn.Linear(64, vocab, bias=False)
        self.order = list(range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for i in self.order:
            x = x + self.blocks[i](x)
        logits: torch.Tensor = self.head(x)
        return logits


SHAPES: dict[str, Callable[[], Mixed]] = {
    "uniform": lambda: Mixed(12, 256, (2,)),
    "gpt": lambda: Mixed(12, 700, (2,)),
    "mixed": Mixed,
}


def make(shape: str) -> Mixed:
    torch.manual_seed(0)
    return SHAPES[shape]()


def on_device(shape: str, units: float, folder: Path, **options: Any) -> Mixed:
    """With room for so many units of the largest size, parameters and gradients."""
    model = make(shape)
    modules = [model.embed, *model.blocks, model.head]
    unit = 2 * max(sum(-(-p.nbytes // 8192) * 8192 for p in m.parameters()) for m in modules)
    budget = offload.Budget(host="64MiB", device=int(units * unit))
    given = {"debug": True, "device": "simulated:latest", "io_block_bytes": 1 << 16, **options}
    return offload.wrap(model, offload.Policy(budget, swap_dir=folder, **given))


def steps(model: nn.Module, count: int, accumulate: int = 1, **options: Any) -> Iterator[float]:
    optimizer = offload.AdamW(model.parameters(), lr=1e-2, **options)
    for step in range(count):
        loss = torch.zeros(())
        for micro in range(accumulate):
            loss = model(TOKENS.roll(step + micro)).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def tier_of(model: nn.Module) -> DeviceTier:
    (tier,) = wrapped(model).context.tiers
    return tier


def counted(model: nn.Module, training: Iterator[float]) -> list[tuple[float, int, int, int]]:
    """Loss, bytes to the device, planned and searched copies of each step."""
    found = []
    before = wrapped(model).counters()
    for loss in training:
        after = wrapped(model).counters()
        names = ("to_device_bytes", "device_planned", "device_searched")
        found.append((loss, *(after[name] - before[name] for name in names)))
        before = after
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("units", [3, 4, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_loop_searches_for_nothing(
    shape: str, units: int, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(steps(make(shape), 5, accumulate))
    model = on_device(shape, units, tmp_path)
    planned = counted(model, steps(model, 5, accumulate))
    assert [loss for loss, *_ in planned] == expected
    assert all(searched == 0 for *_, searched in planned[2:])
    assert all(found > 0 for *_, found, _ in planned[2:])
    assert tier_of(model).device.stats()["conflicts"] == 0

    monkeypatch.setattr(DevicePlaces, "begin_pass", lambda self: None)  # nothing is recorded
    model = on_device(shape, units, tmp_path)
    best_fit = counted(model, steps(model, 5, accumulate))
    assert [loss for loss, *_ in best_fit] == expected
    assert sum(row[1] for row in planned[2:]) <= sum(row[1] for row in best_fit[2:])
    assert all(found == 0 for *_, found, _ in best_fit)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_of_updates_have_places_too(shape: str, lazy: bool, tmp_path: Path) -> None:
    expected = list(steps(make(shape), 6))
    model = on_device(shape, 8, tmp_path, update="device", lazy_step=lazy)
    found = counted(model, steps(model, 6))
    assert [loss for loss, *_ in found] == expected
    assert all(searched == 0 for *_, searched in found[3:])
    counters = wrapped(model).counters()
    assert counters["updates"] == 0
    assert counters["device_updates"] > 0


def test_stepping_inside_the_backward_searches_for_nothing(tmp_path: Path) -> None:
    expected = list(steps(make("mixed"), 5, step_in_backward=True))
    model = on_device("mixed", 3, tmp_path)
    found = counted(model, steps(model, 5, step_in_backward=True))
    assert [loss for loss, *_ in found] == expected
    assert all(searched == 0 for *_, searched in found[2:])


def test_generating_keeps_what_fits(tmp_path: Path) -> None:
    """A pass without a backward is a step of its own."""
    plain, model = make("gpt"), on_device("gpt", 3, tmp_path)
    nbytes = []
    with torch.no_grad():
        for i in range(5):
            before = wrapped(model).counters()["to_device_bytes"]
            assert torch.equal(model(TOKENS.roll(i)), plain(TOKENS.roll(i)))
            nbytes.append(wrapped(model).counters()["to_device_bytes"] - before)
    assert nbytes[-1] < nbytes[0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_any_order_is_exact(accumulate: int, tmp_path: Path) -> None:
    """Blocks change places, are left out, and come twice; evaluation comes in between."""
    plain, model = make("mixed"), on_device("mixed", 3, tmp_path)
    generator = torch.Generator().manual_seed(1)
    pairs = zip(steps(plain, 12, accumulate), steps(model, 12, accumulate), strict=True)
    for number, (expected, loss) in enumerate(pairs):
        assert loss == expected
        with torch.no_grad():
            assert torch.equal(plain(TOKENS), model(TOKENS))
        count = 9 if number < 8 else int(torch.randint(3, 12, (), generator=generator))
        order = torch.randint(0, 9, (count,), generator=generator).tolist()
        order = order if number >= 4 else torch.randperm(9, generator=generator).tolist()
        plain.order = model.order = order
    for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_order_that_stays_is_planned_for(tmp_path: Path) -> None:
    plain, model = make("mixed"), on_device("mixed", 3, tmp_path)
    training = steps(plain, 10), steps(model, 10)
    for number in range(10):
        before = wrapped(model).counters()
        assert next(training[0]) == next(training[1])
        searched = wrapped(model).counters()["device_searched"] - before["device_searched"]
        assert searched == 0 or number not in (3, 4, 8, 9)
        if number == 4:
            plain.order = model.order = [8, 0, 7, 1, 6, 2, 5, 3, 4]


# -- the tier alone -------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path) -> Mixed:
    """A model after three steps, with nothing on the device or on its way."""
    model = on_device("uniform", 3, tmp_path)
    for _ in steps(model, 3):
        pass
    context, tier = wrapped(model).context, tier_of(model)
    context.flush()
    for unit in context.units:
        context.mover.settle(unit.param_slab)
        context.mover.fetch(unit.param_slab)
    tier.room.clear()
    tier.room.places.needs = {}
    tier.room.next_use = {}
    return model


def sharing(tier: DeviceTier, model: nn.Module) -> tuple[Slab, Slab]:
    """Two slabs with the same place."""
    slabs = [unit.param_slab for unit in wrapped(model).context.units]
    places = [tier.room.places.place_of(slab) for slab in slabs]
    first = next(i for i, place in enumerate(places) if place is not None and place in places[:i])
    return slabs[first], slabs[places.index(places[first])]


def place(tier: DeviceTier, slab: Slab) -> int:
    copy = tier.copy_of(slab)
    assert copy is not None
    return copy.lease.offset


def test_a_copy_goes_to_its_place_and_what_was_there_is_dropped(planned: Mixed) -> None:
    tier = tier_of(planned)
    first, second = sharing(tier, planned)
    for slab in (first, second):
        assert tier.prefetch(slab, 0)
        assert place(tier, slab) == tier.room.places.place_of(slab)
    assert tier.copy_of(first) is None


@pytest.mark.parametrize("how", ["lock", "ahead", "held", "tensor"])
def test_a_copy_whose_place_is_in_use_goes_elsewhere(planned: Mixed, how: str) -> None:
    tier = tier_of(planned)
    first, second = sharing(tier, planned)
    first.locks += 1
    copy = tier.fetch(first)
    first.locks -= how != "lock"
    copy.ahead = how == "ahead"
    if how == "held":
        tier.room.held.add(first)
    kept = copy.view(0, (1,), (1,), torch.uint8) if how == "tensor" else None
    del copy
    searched = tier.room.places.searched
    assert not tier.prefetch(second, 0)
    assert tier.copy_of(second) is None
    second.locks += 1
    tier.fetch(second)
    assert place(tier, second) != tier.room.places.place_of(second)
    assert tier.room.places.searched == searched + 1
    second.locks -= 1
    del kept
    tier.room.begin_pass()  # what is elsewhere is given up, so that it comes back to its place
    assert tier.copy_of(second) is None


def test_a_place_that_is_needed_sooner_is_left_alone(planned: Mixed) -> None:
    """By a copy that is there, or by one that is not there yet."""
    tier = tier_of(planned)
    first, second = sharing(tier, planned)
    tier.room.places.needs = {first: 3}
    assert not tier.prefetch(second, 4)
    assert tier.copy_of(second) is None
    assert tier.prefetch(second, 2)
    tier.drop(second)
    tier.room.places.needs, tier.room.next_use = {}, {first: 3}
    assert tier.prefetch(first, 3)
    assert not tier.prefetch(second, 4)
    assert tier.copy_of(first) is not None
    assert tier.prefetch(second, 2)
    assert tier.copy_of(first) is None


def test_modules_around_others_have_their_places_from_the_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    budget = offload.Budget(host="64MiB", device="8MiB")
    policy = offload.Policy(budget, device="simulated:latest", swap_dir=tmp_path, debug=True)
    model = offload.wrap(t.Stack(layers=2), policy)
    tier, nested = tier_of(model), wrapped(model).context.units[-1]
    slabs = [u.param_slab for u in wrapped(model).context.units if "scale" in u.params[0].name]
    assert tier.room.home is not None, nested.name
    for slab in slabs:
        slab.locks += 1
        searched = tier.room.places.searched
        tier.fetch(slab)
        assert tier.room.places.searched == searched
        slab.locks -= 1


def test_the_report_tells_how_many_were_planned(planned: Mixed) -> None:
    report = offload.report(planned)
    assert report.counters["device_planned"] == tier_of(planned).room.places.planned > 0
    assert any("copies to planned places" in note for note in report.notes)
