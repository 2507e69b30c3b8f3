"""deferred_init(): the same bits and the same generator as without it, whatever the module does."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training as t
from initialised import MAKERS, Buffered, Tied
from torch import nn

import offload
from offload.runtime.scratch_memory import region_of


def made(make: Callable[[], nn.Module], folder: Path | None) -> tuple[nn.Module, torch.Tensor]:
    """A module made after one seed, and what the generator gives next."""
    torch.manual_seed(11)
    if folder is None:
        return make(), torch.get_rng_state()
    with offload.deferred_init(folder):
        module = make()
    return module, torch.get_rng_state()


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Values, strides, dtypes, kinds and what is tied to what."""
    found, expected = tensors(ours), tensors(theirs)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor), name
        assert found[name].dtype is tensor.dtype, name
        assert found[name].stride() == tensor.stride(), name
        assert found[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(found[name], tensor), name
    same = {(a, b) for a in expected for b in expected if expected[a] is expected[b]}
    assert same == {(a, b) for a in found for b in found if found[a] is found[b]}


def deferred_bytes(module: nn.Module) -> int:
    found = tensors(module).values()
    return sum(tensor.nbytes for tensor in found if region_of(tensor) is not None)


@pytest.mark.parametrize("name", MAKERS)
def test_values_and_generator_are_those_of_an_eager_run(name: str, tmp_path: Path) -> None:
    theirs, expected = made(MAKERS[name], None)
    ours, found = made(MAKERS[name], tmp_path)
    assert torch.equal(found, expected)
    assert deferred_bytes(ours) > 0
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", MAKERS)
def test_materialize_gives_ordinary_memory_for_good(name: str, tmp_path: Path) -> None:
    theirs, _ = made(MAKERS[name], None)
    ours, _ = made(MAKERS[name], tmp_path)
    before = tensors(ours)
    offload.materialize(ours)
    after = tensors(ours)
    assert all(after[name] is before[name] for name in before)
    assert deferred_bytes(ours) == 0
    assert_same(ours, theirs)


def test_generator_draws_between_modules_are_in_the_same_order(tmp_path: Path) -> None:
    def make() -> nn.Module:
        first = nn.Linear(200, 200)
        scale = torch.rand(()).item()
        second = nn.Linear(200, 200)
        nn.init.normal_(second.weight, std=scale)
        return nn.Sequential(first, second, nn.Linear(int(torch.randint(100, 300, ()).item()), 400))

    theirs, expected = made(make, None)
    ours, found = made(make, tmp_path)
    assert torch.equal(found, expected)
    assert_same(ours, theirs)


def test_a_generator_of_the_callers_own_advances_alike(tmp_path: Path) -> None:
    def make(generator: torch.Generator) -> nn.Module:
        linear = nn.Linear(200, 200)
        nn.init.uniform_(linear.weight, generator=generator)
        return linear

    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    theirs, _ = made(lambda: make(generators[0]), None)
    ours, _ = made(lambda: make(generators[1]), tmp_path)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert_same(ours, theirs)


def test_a_wrapped_deferred_model_trains_as_an_eager_one(tmp_path: Path) -> None:
    loop = t.Loop(steps=3)
    expected = t.plain(lambda: t.Stack(tied=True), loop)

    def make() -> nn.Module:
        with offload.deferred_init(tmp_path):
            return t.Stack(tied=True)

    t.assert_same(expected, t.offloaded(make, loop, tmp_path, 16 << 20))


def test_wrap_takes_everything_out_of_the_file_and_gives_its_space_back(tmp_path: Path) -> None:
    def files() -> list[int]:
        found = []
        for link in Path("/proc/self/fd").iterdir():
            target = str(link.readlink()) if link.is_symlink() else ""
            if target.startswith(str(tmp_path / "scratch")):
                found.append(link.stat().st_blocks * 512)
        return found

    (tmp_path / "scratch").mkdir()
    with offload.deferred_init(tmp_path / "scratch"):
        model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)], nn.BatchNorm1d(512))
        model.register_buffer("table", torch.rand(300, 300))
    assert sum(files()) >= 8 << 20
    policy = offload.Policy(
        offload.Budget(host="8MiB"), swap_dir=tmp_path, max_unit_bytes="1MiB", io_block_bytes=2**16
    )
    offload.wrap(model, policy)
    gc.collect()
    assert files() == []
    assert region_of(model.table) is None
    model(torch.rand(4, 512)).sum().backward()


def test_a_deferred_model_works_before_it_is_wrapped(tmp_path: Path) -> None:
    theirs, _ = made(Buffered, None)
    ours, _ = made(Buffered, tmp_path)
    x = torch.rand(16, 128)
    outputs = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])


def test_modules_of_other_devices_and_views_of_older_memory_are_left_alone(tmp_path: Path) -> None:
    weights = torch.rand(200, 200)
    with offload.deferred_init(tmp_path):
        meta = nn.Linear(200, 200, device="meta")
        shares = nn.Embedding.from_pretrained(weights)
        array = torch.from_numpy(weights.numpy())
    assert meta.weight.is_meta
    assert shares.weight.data_ptr() == array.data_ptr() == weights.data_ptr()


def test_a_block_inside_another_changes_nothing(tmp_path: Path) -> None:
    with offload.deferred_init(tmp_path):
        with offload.deferred_init():
            inner = nn.Linear(200, 200)
        outer = nn.Linear(200, 200)
        with pytest.raises(offload.PolicyError, match="within one that uses"):
            offload.deferred_init(tmp_path / "other").__enter__()
    region = region_of(inner.weight)
    assert region is not None
    assert region.memory is region_of(outer.weight).memory  # type: ignore[union-attr]


def test_an_exception_in_the_block_ends_it(tmp_path: Path) -> None:
    with pytest.raises(TypeError), offload.deferred_init(tmp_path):
        nn.Linear(200)  # type: ignore[call-arg]
    assert region_of(nn.Linear(200, 200).weight) is None


def test_small_tensors_stay_in_memory(tmp_path: Path) -> None:
    with offload.deferred_init(tmp_path):
        norm = nn.LayerNorm(1024)
    assert deferred_bytes(norm) == 0


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(offload.SwapIOError, match="missing") as caught:
        offload.deferred_init(tmp_path / "missing").__enter__()
    assert caught.value.filename == str(tmp_path / "missing")


def test_a_full_disk_is_an_error_of_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(offload.SwapSpaceError), offload.deferred_init(tmp_path):
        nn.Linear(200, 200)


def test_a_default_folder_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.runtime.scratch_memory._filesystem", lambda folder: "tmpfs")
    with pytest.raises(offload.PolicyError, match="name one with"):
        offload.deferred_init().__enter__()


def test_a_dropped_model_gives_its_space_back(tmp_path: Path) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with offload.deferred_init(tmp_path):
        kept = nn.Linear(512, 512)
        nn.Linear(2048, 2048)
    region = region_of(kept.weight)
    assert region is not None
    assert os.fstat(region.memory.fd).st_blocks * 512 < 2 << 20
    del kept, region
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_tied_parameters_stay_one_when_part_of_a_model_is_materialized(tmp_path: Path) -> None:
    model, _ = made(Tied, tmp_path)
    offload.materialize(model.head)
    assert model.head.weight is model.embed.weight
    assert region_of(model.embed.weight) is None
    assert region_of(model.blocks[1].weight) is not None


def test_a_model_may_be_wrapped_and_trained_within_the_block(tmp_path: Path) -> None:
    loop = t.Loop(steps=2, grads=False)
    expected = t.plain(t.Stack, loop)
    with offload.deferred_init(tmp_path):
        found = t.offloaded(t.Stack, loop, tmp_path, 16 << 20)
    t.assert_same(expected, found)


def test_a_forked_child_that_drops_the_model_leaves_the_parents_alone(tmp_path: Path) -> None:
    with offload.deferred_init(tmp_path):
        linear = nn.Linear(512, 512)
    before = linear.weight.detach().clone()
    child = os.fork()
    if child == 0:
        del linear
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear.weight, before)


def test_saving_writes_no_more_than_the_tensors(tmp_path: Path) -> None:
    with offload.deferred_init(tmp_path):
        linear = nn.Linear(129, 129)
    torch.save(linear.state_dict(), tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 4 * 129 * 130 + 2000
