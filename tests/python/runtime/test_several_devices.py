"""A model on several devices: plain training's bits, each device used, tensors where they must be.

On simulated devices, which torch takes for the CPU: locations.py says where tensors would be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from locations import HOST, Locations, MixedDevicesError, located, tracked
from torch import nn

import offload
from offload import _native
from offload.runtime.device_moves import DeviceMoves, ForwardPass
from offload.runtime.device_shares import DeviceShares, share_out
from offload.runtime.discover import find_units
from offload.runtime.precision import compute_dtypes
from offload.runtime.wrapped import wrapped
from offload.tiers import touch
from offload.tiers.compute_device import CPU
from offload.tiers.device_tier import COPY, DeviceTier
from offload.tiers.joined_tiers import JoinedTiers
from offload.tiers.mover import Mover

pytestmark = [pytest.mark.own_device, pytest.mark.usefixtures("one_thread")]
LATEST = ["simulated:latest", "simulated:latest"]
UNIT = 2 * 1054720
"""Parameters and gradients of a block of t.Stack."""
LOOP = t.Loop(steps=3, micro_batches=2)


class Tied(t.Stack):
    def __init__(self) -> None:
        super().__init__(tied=True)


class Skips(t.Stack):
    """The root's own parameters meet activations of each device; a block has several inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Dropout(0.0)
        for block in self.blocks:
            block.register_buffer("shift", torch.ones(1))
            block.forward = self.shifted(block)

    @staticmethod
    def shifted(block: nn.Module) -> Any:
        def forward(x: torch.Tensor, *, more: dict[str, Any]) -> tuple[torch.Tensor, Any]:
            y = x + block.out(nn.functional.gelu(block.mix(block.norm(x))))
            return y + more["bias"][0] * block.shift, more

        return forward

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(tokens, self.embed.weight)
        bias = x.mean(-1, keepdim=True)
        for i, block in enumerate(self.blocks):
            x, _ = block(x * self.scale if i % 3 == 0 else x, more={"bias": [bias]})
        logits: torch.Tensor = self.head(self.norm(x) * self.scale)
        return logits


MODELS = [
    t.Stack,
    Tied,
    Skips,
    t.Checkpointed,
    t.CheckpointedReentrant,
    t.CheckpointedInside,
    t.UsesOthersWeight,
    t.SharedBlock,
    t.Routed,
    t.Convolutional,
]


def wrap(
    folder: Path, make: t.Model = t.Stack, device: Any = LATEST, nbytes: int = 3 * UNIT, **more: Any
) -> nn.Module:
    """Everything spilled to the disk that may be, and `nbytes` on each device."""
    options = {"debug": True, **t.SMALL_BLOCKS, **more}
    budget = offload.Budget(host=t.least_budget(make, **options), device=nbytes)
    torch.manual_seed(0)
    return offload.wrap(make(), offload.Policy(budget, device=device, swap_dir=folder, **options))


def train(model: nn.Module, loop: t.Loop = LOOP) -> t.Outcome:
    return t.train(model, offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1), loop)


def tiers_of(model: nn.Module) -> tuple[DeviceTier, ...]:
    return wrapped(model).context.tiers


def assert_used(model: nn.Module, count: int = 2) -> None:
    found = offload.report(model).as_dict()["devices"]
    assert len(found) == count
    for device in found:
        assert device["to_device_bytes"] > 0
        assert device["to_host_bytes"] > 0
        assert device["device_peak_bytes"] <= device["device_budget_bytes"]
        assert f"{device['device']}: at most" in str(offload.report(model))
    assert all(tier.device.stats()["conflicts"] == 0 for tier in tiers_of(model))


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_training_is_exact(make: t.Model, tmp_path: Path) -> None:
    nbytes = 12 * UNIT if make is t.Convolutional else 3 * UNIT
    expected = t.plain(make, LOOP)
    model = wrap(tmp_path, make, nbytes=nbytes)
    t.assert_same(expected, train(model))
    assert_used(model)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize(
    "device",
    [
        ["simulated", "simulated"],
        ["simulated:earliest", "simulated:latest"],
        ("simulated:latest",) * 3,
    ],
    ids=["timed", "mixed", "three"],
)
def test_paces_and_numbers(device: Any, lazy: bool, tmp_path: Path) -> None:
    loop = t.Loop(steps=2, micro_batches=1)
    expected = t.plain(t.Stack, loop)
    model = wrap(tmp_path, device=device, lazy_step=lazy)
    t.assert_same(expected, train(model, loop))
    assert_used(model, len(device))


@pytest.mark.parametrize("update", ["device", "auto"])
def test_updates_run_on_each_units_device(update: str, tmp_path: Path) -> None:
    expected = t.plain(t.Stack, LOOP)
    torch.manual_seed(0)
    options = {"debug": True, "update": update, "max_unit_bytes": "2MiB", **t.SMALL_BLOCKS}
    budget = offload.Budget(host="24MiB", device="12MiB")
    policy = offload.Policy(budget, device=LATEST, swap_dir=tmp_path, **options)
    model = offload.wrap(t.Stack(), policy)
    t.assert_same(expected, train(model))
    assert_used(model)
    context = wrapped(model).context
    if update == "device":
        on = {context.units[i].tier for i in context.device_units}
        assert on == set(tiers_of(model))
        assert offload.report(model).as_dict()["device_updates"] > 0


@pytest.mark.parametrize("mode", ["disk", "recompute"])
def test_activations(mode: str, tmp_path: Path) -> None:
    expected = t.plain(t.Stack, LOOP)
    host = t.least_budget(t.Stack, debug=True) + (8 << 20)
    policy = offload.Policy(
        offload.Budget(host=host, device=3 * UNIT),
        device=LATEST,
        swap_dir=tmp_path,
        debug=True,
        activations=mode,
        activation_bytes="8MiB",
        **t.SMALL_BLOCKS,
    )
    torch.manual_seed(0)
    model = offload.wrap(t.Stack(), policy)
    t.assert_same(expected, train(model))
    assert_used(model)


def test_parameters_can_be_looked_at_changed_and_taken_back(tmp_path: Path) -> None:
    plain, model = t.Stack(), wrap(tmp_path)
    plain.load_state_dict(model.state_dict())
    for each in (plain, model):
        with torch.no_grad():
            for param in each.parameters():
                param.mul_(1.25)
            each.scale.data.add_(1)
    for number in (0, 9):
        with offload.materialize(model.blocks[number]):
            model.blocks[number].mix.weight.data.add_(2)
        plain.blocks[number].mix.weight.data.add_(2)
    t.assert_same(train(plain), train(model))
    offload.unwrap(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


# -- which device has what -----------------------------------------------------------------------


def shares_of(model: nn.Module, devices: int = 2, limit: int = 1 << 30) -> DeviceShares:
    dtypes = compute_dtypes(model, None)
    return share_out(model, find_units(model, None, limit, dtypes), dtypes, devices)


def test_blocks_are_whole_and_follow_each_other() -> None:
    model = t.Stack()
    for limit in (1 << 30, 100_000):  # blocks are split into units
        shares = shares_of(model, limit=limit)
        assert shares.count == 2
        on = [{shares.modules[m] for m in block.modules()} for block in model.blocks]
        assert all(len(devices) == 1 for devices in on)
        found = [next(iter(devices)) for devices in on]
        assert found == [0] * 5 + [1] * 5
        assert model not in shares.modules
        assert (shares.modules[model.embed], shares.modules[model.head]) == (0, 1)
        assert shares.following[model.blocks[4]] == 1


def test_what_shares_weights_is_together() -> None:
    tied = Tied()
    shares = shares_of(tied)
    assert shares.modules[tied.head] == shares.modules[tied.embed] == 0

    class Biased(t.Stack):
        """As BERT: the head has the embedding's weight and a bias of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(256, 64)
            self.head.weight = self.embed.weight

    model = Biased()
    found = find_units(model, None, 1 << 30, compute_dtypes(model, None))
    shares = shares_of(model)
    of = {unit.name: device for unit, device in zip(found.units, shares.units, strict=True)}
    assert of["head"] == of["embed"] == 0
    conv = t.Convolutional()
    shares = shares_of(conv)
    assert shares.modules[conv.convs[2]] == shares.modules[conv.convs[0]]


def test_modules_without_weights() -> None:
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64, affine=False),
        nn.Identity(),
    )
    shares = shares_of(model)
    assert shares.modules == {model[0]: 0, model[2]: 1, model[3]: 1}
    assert model[1] in shares.parts
    whole = nn.Linear(4, 4)
    assert shares_of(whole).count == 1
    assert shares_of(nn.Sequential(nn.Linear(4, 4)), devices=8).count == 1


# -- moves ---------------------------------------------------------------------------------------


def located_training(
    make: t.Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Locations, t.Outcome]:
    with located(monkeypatch):
        model = wrap(folder, make, nbytes=12 * UNIT)
    with tracked(model, monkeypatch) as locations:
        outcome = train(model, t.Loop(steps=2, micro_batches=1, clip=None))
    assert_used(model)
    return locations, outcome


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_operands_are_on_one_device(
    make: t.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = t.plain(make, t.Loop(steps=2, micro_batches=1, clip=None))
    locations, found = located_training(make, tmp_path, monkeypatch)
    t.assert_same(expected, found)
    assert locations.moves[HOST, 0] > 0
    assert locations.moves[0, 1] > 0


def test_tensors_are_moved_as_seldom_as_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of two forwards: the input, the activations once, the root's scale, the output."""
    locations, _ = located_training(t.Stack, tmp_path, monkeypatch)
    assert locations.moves == {(HOST, 0): 2, (0, 1): 4, (1, HOST): 2}


def test_what_several_blocks_are_given_is_moved_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of two forwards: activations, bias, and three uses of the scale behind them."""
    locations, _ = located_training(Skips, tmp_path, monkeypatch)
    assert locations.moves == {(HOST, 0): 2, (0, 1): 10, (1, HOST): 2}


def test_a_tensor_that_changed_is_moved_again() -> None:
    passed, meta = ForwardPass(CPU), torch.device("meta")
    tensor = torch.ones(3, requires_grad=True) * 1
    copy = passed.moved(tensor, meta)
    assert copy.is_meta
    assert passed.moved(tensor, meta) is copy
    assert passed.moved(tensor.view(3), meta) is not copy
    with torch.no_grad():
        assert passed.moved(tensor, meta) is not copy
    assert passed.moved(tensor, meta) is copy
    copy.add_(1)
    other = passed.moved(tensor, meta)
    assert other is not copy
    tensor.add_(1)
    assert passed.moved(tensor, meta) is not other
    with torch.inference_mode():
        assert passed.moved(torch.ones(3), meta).is_meta


def no_hooks(self: DeviceMoves, module: nn.Module, place: Any) -> None:
    pass


@pytest.mark.parametrize("left_out", ["before", "around", "gathered"])
def test_no_move_may_be_missing(
    left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left_out == "gathered":
        monkeypatch.setattr(touch, "_gathered", lambda func, args, kwargs: (args, kwargs))
    elif left_out == "before":
        monkeypatch.setattr(DeviceMoves, "_before", no_hooks)
        monkeypatch.setattr(DeviceMoves, "_after", no_hooks)
    else:
        monkeypatch.setattr(DeviceMoves, "_around", no_hooks)
    if left_out == "around":
        locations, _ = located_training(t.Stack, tmp_path, monkeypatch)
        assert (1, HOST) not in locations.moves
        return
    with pytest.raises(MixedDevicesError):
        located_training(Skips, tmp_path, monkeypatch)


def test_a_checkpointed_block_is_given_inputs_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps the random state of the devices of the arguments, before the block moves them."""
    seen = []
    with located(monkeypatch):
        model = wrap(tmp_path)
    run = t.Stack.run
    with tracked(model, monkeypatch) as locations:

        def noted(self: t.Stack, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            seen.append(locations.of(x))
            return run(self, block, x)

        monkeypatch.setattr(t.Stack, "run", noted)
        model(torch.arange(24).view(2, 12))
    assert seen == [0] * 5 + [1] * 5


def test_other_objects_are_passed_on_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cache:
        def __init__(self) -> None:
            self.values: list[torch.Tensor] = []

    cache, names, seen = Cache(), ["a"], []

    class Caching(t.Stack):
        def forward(self, tokens: torch.Tensor) -> Any:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x, cache, names=names)
            return {"logits": [self.head(x)], "cache": cache}

    def forward(block: nn.Module) -> Any:
        plain = block.forward

        def run(x: torch.Tensor, cache: Cache, names: list[str]) -> torch.Tensor:
            cache.values.append(x)
            seen.append(names)
            y: torch.Tensor = plain(x)
            return y

        return run

    def make() -> nn.Module:
        model = Caching()
        for block in model.blocks:
            block.forward = forward(block)
        return model

    with located(monkeypatch):
        model = wrap(tmp_path, make)
    with tracked(model, monkeypatch) as locations:
        output = model(torch.arange(24).view(2, 12))
        assert output["cache"] is cache
        assert locations.of(output["logits"][0]) == HOST
        assert [locations.of(value) for value in cache.values] == [0] * 5 + [1] * 5
    assert all(given is names for given in seen)


# -- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "reason",
    [
        "copy to the device before its use",
        "use before the copy to the host",
        "reuse of device memory",
    ],
)
def test_no_wait_of_either_device_may_be_missing(reason: str, number: int, tmp_path: Path) -> None:
    model = wrap(tmp_path)
    tiers_of(model)[number].device.omit_waits(reason)
    with pytest.raises(offload.UnorderedAccessError):
        train(model)


def test_the_next_devices_units_come_while_this_one_computes(tmp_path: Path) -> None:
    model = wrap(tmp_path)
    first = next(u for u in wrapped(model).context.units if u.name.startswith("blocks.5"))
    seen = []

    def look(module: nn.Module, args: Any) -> None:
        tier = tiers_of(model)[1]
        assert first.tier is tier
        seen.append(tier.copy_of(first.param_slab) is not None)

    train(model, t.Loop(steps=1))
    model.blocks[3].register_forward_pre_hook(look)
    train(model, t.Loop(steps=2, micro_batches=2))
    assert len(seen) == 4
    assert all(seen[1::2])  # the first of each step waits for updates


def two_slabs(model: nn.Module) -> list[Any]:
    """A slab of each device, in host memory, the second's being copied to its device."""
    context = wrapped(model).context
    units = [u for u in context.units if not u.param_slab.pinned]
    slabs = [next(u.param_slab for u in units if u.tier is tier) for tier in context.tiers]
    for slab, tier in zip(slabs, context.tiers, strict=True):
        tier.room.clear()
        context.mover.settle(slab)
        context.mover.fetch(slab)
    context.tiers[1].drop(slabs[1])
    assert context.tiers[1].prefetch(slabs[1], 0)
    return slabs


def test_memory_that_one_device_reads_is_not_given_to_the_other(tmp_path: Path) -> None:
    model = wrap(tmp_path)
    mover, tiers = wrapped(model).context.mover, tiers_of(model)
    _, slab = two_slabs(model)
    assert isinstance(mover.readers, JoinedTiers)
    assert mover.readers.is_reading(slab)
    while mover.readers.end_one():
        pass
    assert not mover.readers.is_reading(slab)
    assert all(tier.device.stats()["conflicts"] == 0 for tier in tiers)


def test_a_device_that_writes_what_another_reads_is_found(tmp_path: Path) -> None:
    model = wrap(tmp_path)
    tiers = tiers_of(model)
    mine, other = two_slabs(model)
    mine.locks += 1
    tiers[0].fetch(mine).ahead = True
    mine.lease = other.lease  # as if it had been given away too early
    with pytest.raises(offload.UnorderedAccessError, match="on the host"):
        tiers[0].send(mine)


def test_the_host_waits_for_either_device_before_it_changes_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(tmp_path)
    mover = wrapped(model).context.mover
    _, slab = two_slabs(model)
    wait = Mover.wait

    def careless(self: Mover, transfer: _native.Transfer, why: str) -> None:
        if why != COPY:
            wait(self, transfer, why)

    monkeypatch.setattr(Mover, "wait", careless)
    with pytest.raises(offload.UnorderedAccessError, match="on the host"):
        mover.settle(slab)


def test_one_arena_is_pinned_for_both_devices() -> None:
    devices = [_native.simulated_device(1 << 20) for _ in range(2)]
    host = _native.HostArena(1 << 16, pin=devices)
    lease = host.allocate(4096)
    torch.frombuffer(lease, dtype=torch.uint8).fill_(7)
    for device in devices:
        there = _native.DeviceArena(device, 4096).allocate(4096)
        device.copy_to_device(there, lease, 4096)
        device.drain()
        assert torch.frombuffer(there.view("read"), dtype=torch.uint8).eq(7).all()
    stranger = _native.simulated_device(1 << 20)
    there = _native.DeviceArena(stranger, 4096).allocate(4096)
    with pytest.raises(offload.OffloadError, match="in no host memory"):
        stranger.copy_to_device(there, lease, 4096)


# -- refusals ------------------------------------------------------------------------------------


def test_a_unit_that_does_not_fit_names_its_device(tmp_path: Path) -> None:
    def uneven() -> nn.Module:
        return nn.Sequential(*(nn.Linear(n, n) for n in (64, 64, 64, 512)))

    options = {**t.SMALL_BLOCKS, "max_unit_bytes": "4MiB"}
    budget = offload.Budget(host=t.least_budget(uneven, **options), device="1MiB")
    policy = offload.Policy(budget, device=LATEST, swap_dir=tmp_path, **options)
    with pytest.raises(offload.BudgetError, match=r"what simulated:latest \(1\) has of this model"):
        offload.wrap(uneven(), policy)


def test_a_list_of_one_is_that_device(tmp_path: Path) -> None:
    model = wrap(tmp_path, device=["simulated:latest"])
    assert len(tiers_of(model)) == 1
    single = offload.wrap(
        nn.Sequential(nn.Linear(64, 64)),
        offload.Policy(offload.Budget(host="1MiB", device="1MiB"), device=LATEST),
    )
    assert any("1 have nothing" in note for note in offload.report(single).notes)
    assert "devices" not in offload.report(model).as_dict()


@pytest.mark.gpu
def test_training_on_two_cuda_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are fewer than two CUDA devices")
    loop = t.Loop(steps=2, micro_batches=1, clip=None)
    model = wrap(tmp_path, device=["cuda:0", "cuda:1"])
    assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
    found = train(model, loop)
    one = wrap(tmp_path, device="cuda:0")
    t.assert_same(train(one, loop), found)
    assert_used(model)
