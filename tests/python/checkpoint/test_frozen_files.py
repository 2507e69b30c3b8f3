"""load_weights(frozen="file"): frozen weights are read from the checkpoint, and never written."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from measured import run
from test_fork import error_of, in_child
from torch import nn

import offload
from offload.runtime.wrapped import wrapped
from offload.tiers.slab import Slab
from offload.tiers.unit import owner_of

save_file: Callable[..., None] = pytest.importorskip("safetensors.torch").save_file

WIDTH = 256
POLICY: dict[str, Any] = {
    "io_block_bytes": 1 << 16,
    "max_unit_bytes": 1 << 20,
    "calibrate_disk": False,
    "debug": True,
}


class Lora(nn.Module):
    """A frozen linear layer and a trained correction of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 8, bias=False)
        self.up = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + self.up(self.down(x))
        return y


class Base(nn.Module):
    """Blocks of 512 KiB; the int8 table gives what follows it in the file odd offsets."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randint(0, 9, (7,), dtype=torch.int8), requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def adapted(base: nn.Module) -> nn.Module:
    """What get_peft_model does: other names, frozen weights."""
    torch.manual_seed(1)
    for block in base.blocks:
        block[0] = Lora(block[0])
        block[2].requires_grad_(False)
    return base


def checkpoint(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    state = {k: v.clone() for k, v in Base(seed=7).state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return state
    places = {}
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / f"part{i}.safetensors")
        places.update(dict.fromkeys(part, f"part{i}.safetensors"))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def policy_for(folder: Path) -> offload.Policy:
    least = t.least_budget(lambda: adapted(Base()), **POLICY)
    return offload.Policy(offload.Budget(host=least), swap_dir=folder, **POLICY)


def before_wrap(folder: Path, deferred: bool = True) -> nn.Module:
    """As for LoRA on a base that does not fit: loaded, adapted, wrapped."""
    if deferred:
        with offload.deferred_init(folder):
            base = Base()
    else:
        base = Base()
    offload.load_weights(base, folder, frozen="file")
    return offload.wrap(adapted(base), policy_for(folder))


def after_wrap(folder: Path) -> nn.Module:
    model = Base().requires_grad_(False)
    model.blocks[7].requires_grad_(True)
    offload.wrap(model, policy_for(folder))
    offload.load_weights(model, folder, frozen="file")
    return model


def in_files(model: nn.Module) -> list[str]:
    return [u.name for u in wrapped(model).context.units if u.param_slab.source is not None]


def spilled(model: nn.Module) -> set[str]:
    found = {u.name for u in wrapped(model).context.units if not u.param_slab.pinned}
    assert {"blocks.2", "blocks.3", "blocks.4"} < found
    return found


def steps(model: nn.Module, count: int = 3) -> list[float]:
    kind = offload.AdamW if "_offload_wrapped" in model.__dict__ else torch.optim.AdamW
    options = {} if kind is offload.AdamW else {"foreach": False}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(params, lr=1e-2, **options)
    losses = []
    for step in range(count):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("deferred", [True, False])
def test_lora_on_a_base_in_files_is_exact(deferred: bool, shards: int, tmp_path: Path) -> None:
    checkpoint(tmp_path, shards)
    plain = Base()
    offload.load_weights(plain, tmp_path)
    expected = steps(adapted(plain))
    model = before_wrap(tmp_path, deferred)
    assert len(in_files(model)) == 8
    written: list[str] = []
    mover = wrapped(model).context.mover
    write_back = mover.write_back

    def noted(slab: Slab) -> None:
        if slab.dirty:
            written.append(slab.name)
        write_back(slab)

    mover.write_back = noted  # type: ignore[method-assign]
    assert steps(model) == expected
    assert not [name for name in written if "frozen" in name]
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    report = offload.report(model)
    assert report.as_dict()["arena_peak_bytes"] <= report.plan.budget_bytes
    assert any("stay in their files" in note for note in report.notes)
    assert len(in_files(model)) == 8
    offload.unwrap(model)
    assert steps(model, 1) == steps(plain, 1)


def test_nothing_frozen_is_ever_written_to_swap(tmp_path: Path) -> None:
    """Counted by the store, and not even reserved."""
    checkpoint(tmp_path)
    model = before_wrap(tmp_path)
    context = wrapped(model).context
    frozen = sum(p.unit.param_bytes for p in context.plan.placements if p.in_file)
    assert frozen > 4 << 20
    assert context.plan.swap_bytes == sum(context.plan.disk_bytes().values()) - frozen
    assert context.store is not None
    steps(model)
    stats = context.store.stats()
    assert stats["reserved_bytes"] < frozen
    spilled = [
        (p.unit.param_bytes * (not p.pin_params) * (not p.in_file), p.unit.grad_bytes, p)
        for p in context.plan.placements
    ]
    assert all(params == 0 or grads > 0 for params, grads, _ in spilled)
    read = context.files().bytes_read
    assert read > 5 * frozen  # once in wrap, and twice in each step


@pytest.mark.parametrize("shards", [1, 3])
def test_a_wrapped_model_moves_to_the_files(shards: int, tmp_path: Path) -> None:
    state = checkpoint(tmp_path, shards)
    model = after_wrap(tmp_path)
    assert in_files(model) == [f"blocks.{i}" for i in range(7)]
    free = wrapped(model).context.store.stats()["free_bytes"]
    assert free > 7 * (512 << 10)  # what they had of the swap files
    plain = Base()
    plain.load_state_dict(state)
    plain.requires_grad_(False).blocks[7].requires_grad_(True)
    assert steps(model) == steps(plain)
    offload.load_weights(model, tmp_path)  # copies
    assert in_files(model) == []
    offload.load_weights(model, tmp_path, frozen="file")
    assert len(in_files(model)) == 7


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "materialize", "load_weights"])
def test_what_is_written_to_moves_to_swap(how: str, tmp_path: Path) -> None:
    state = checkpoint(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    model = after_wrap(tmp_path)
    plain = Base()
    plain.load_state_dict(state)
    names = ("blocks.1.0.weight", "blocks.1.2.bias")
    with torch.no_grad():
        for name in names:
            plain.get_parameter(name).mul_(2)
    if how == "in place":
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).mul_(2)
    elif how == "load_state_dict":
        model.load_state_dict(plain.state_dict())
    elif how == "materialize":
        with offload.materialize(model.blocks[1]) as block:
            block[0].weight.data.mul_(2)
            block[2].bias.data.mul_(2)
    else:
        other = tmp_path / "other.safetensors"
        save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, other)
        offload.load_weights(model, other)
    assert "blocks.1" not in in_files(model)
    for _ in range(2):  # others pass through the memory meanwhile
        model(torch.zeros(1, WIDTH))
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_what_cannot_stay_is_copied(tmp_path: Path) -> None:
    state = checkpoint(tmp_path)
    state = {k: v.bfloat16() if "blocks.2." in k else v for k, v in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    model = Base().requires_grad_(False)
    weight = model.blocks[3][0].weight
    weight.data = weight.data.t().contiguous().t()
    offload.wrap(model, policy_for(tmp_path))
    offload.load_weights(model, tmp_path, frozen="file")
    assert set(in_files(model)) == spilled(model) - {"blocks.2", "blocks.3"}
    plain = Base()
    plain.load_state_dict(state)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_was_changed_between_loading_and_wrap_is_copied(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    base = Base()
    offload.load_weights(base, tmp_path, frozen="file")
    base.blocks[2][2].weight.data[3, 3] += 1  # which no version counter tells
    expected = {k: v.clone() for k, v in base.state_dict().items()}
    model = offload.wrap(base.requires_grad_(False), policy_for(tmp_path))
    assert set(in_files(model)) == spilled(model) - {"blocks.2"}
    (note,) = [n for n in offload.report(model).notes if "was copied to swap" in n]
    assert note.startswith("blocks.2 was copied to swap: it is not what its file has")
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_narrowed_units_are_copied(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    base = Base().requires_grad_(False)
    base.blocks[7].requires_grad_(True)
    offload.load_weights(base, tmp_path, frozen="file")
    least = t.least_budget(lambda: adapted(Base()), **POLICY)
    policy = offload.Policy(
        offload.Budget(host=least), swap_dir=tmp_path, param_dtype=torch.bfloat16, **POLICY
    )
    model = offload.wrap(base, policy)
    assert in_files(model) == []
    for name, value in Base(seed=7).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# -- files that change ------------------------------------------------------------------------


def damage(how: str, file: Path) -> None:
    status = file.stat()
    if how == "truncated":
        os.truncate(file, 1000)
    elif how == "changed":
        with file.open("r+b") as stream:
            stream.seek(status.st_size // 2)
            stream.write(b"\\x55" * 8)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a careful vandal does


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "cut short"), ("changed", "other bytes than when it was first read")],
)
def test_a_file_that_changes_is_noticed(how: str, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = after_wrap(tmp_path)
    damage(how, tmp_path / "model.safetensors")

    def passes() -> None:
        for _ in range(3):  # what the ring holds was read before
            model(torch.zeros(1, WIDTH))

    with pytest.raises(offload.CorruptionError, match=message) as caught:
        passes()
    assert "model.safetensors" in str(caught.value)
    assert "blocks." in str(caught.value)


def test_a_file_that_is_deleted_or_replaced_goes_on_being_read(tmp_path: Path) -> None:
    state = checkpoint(tmp_path)
    model = after_wrap(tmp_path)
    file = tmp_path / "model.safetensors"
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").rename(file)
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_was_replaced_before_wrap_is_not_believed(
    replaced: bool, tmp_path: Path
) -> None:
    state = checkpoint(tmp_path)
    base = Base()
    offload.load_weights(base, tmp_path, frozen="file")
    (tmp_path / "model.safetensors").unlink()
    if replaced:
        other = {k: torch.zeros_like(v) for k, v in state.items()}
        save_file(other, tmp_path / "model.safetensors")
    model = offload.wrap(base.requires_grad_(False), policy_for(tmp_path))
    assert in_files(model) == []
    assert any("model.safetensors" in note for note in offload.report(model).notes)
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_links_are_followed_and_other_files_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to("blob")  # as hubs keep them
    assert len(in_files(after_wrap(tmp_path))) == 7
    from offload import _native

    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "no regular file"), (tmp_path, "no regular file")):
        with pytest.raises(offload.OffloadError, match=what):
            _native.ReadOnlyFile(str(path))
    with pytest.raises(offload.SwapIOError, match="No such file"):
        _native.ReadOnlyFile(str(tmp_path / "none"))


def test_another_word_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    frozen: Any = "mmap"
    with pytest.raises(offload.PolicyError, match="expected one of copy, file"):
        offload.load_weights(Base(), tmp_path, frozen=frozen)


def test_a_dropped_model_closes_its_files(tmp_path: Path) -> None:
    checkpoint(tmp_path)

    def open_files() -> int:
        entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum(entry.resolve() == tmp_path / "model.safetensors" for entry in entries)

    model = after_wrap(tmp_path)
    assert open_files() == 1
    offload.unwrap(model)
    del model
    assert open_files() == 0


def test_memory_is_the_budget_and_page_cache_does_not_grow(tmp_path: Path) -> None:
    """400 MiB of frozen fp32 parameters, read again and again under a cap."""
    state = {f"{i}.weight": torch.full((2048, 2048), float(i)) for i in range(25)}
    save_file(state, tmp_path / "model.safetensors")
    del state
    found = run(
        """
import ctypes, mmap, os

def cached(path):
    size = os.path.getsize(path)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fd = os.open(path, os.O_RDONLY)
    place = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert libc.mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), resident) == 0
    return sum(byte & 1 for byte in resident) * mmap.PAGESIZE

begin(192 * MIB)
with offload.deferred_init(sys.argv[1]):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(25)])
path = sys.argv[1] + "/model.safetensors"
offload.load_weights(model, path, frozen="file")
model.requires_grad_(False)
fd = os.open(path, os.O_RDONLY)
os.fsync(fd)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
policy = offload.Policy(
    offload.Budget(host=96 * MIB), swap_dir=sys.argv[1], max_unit_bytes=16 * MIB,
    calibrate_disk=False,
)
offload.wrap(model, policy)
for _ in range(2):
    model(torch.rand(2, 2048))
means = [p.mean().item() for p in model.parameters()]
written = offload.report(model).as_dict()["disk_write_bytes"]
report(cached=cached(path), written=written, right=means == [float(i) for i in range(25)])
""",
        tmp_path,
    )
    assert found["right"]
    assert found["written"] == 0
    assert found["cached"] < 32 << 20
    assert found["peak"] < (96 + 64 + 32) << 20


def test_the_parameters_know_their_owner(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = before_wrap(tmp_path)
    assert all(owner_of(param) is not None for param in model.parameters())
    assert not any(hasattr(param, "_offload_origin") for param in model.parameters())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_a_forked_child_is_told_and_may_drop_the_model(engine: str, tmp_path: Path) -> None:
    state = checkpoint(tmp_path)
    policy = dataclasses.replace(policy_for(tmp_path), io_engine=engine)
    models = [offload.wrap(Base().requires_grad_(False), policy)]
    offload.load_weights(models[0], tmp_path, frozen="file")

    def child() -> str:
        said = error_of(lambda: models[0](torch.zeros(1, WIDTH)))
        models.clear()
        gc.collect()
        return said

    assert "forked child" in in_child(child)
    for name, value in state.items():
        assert torch.equal(models[0].state_dict()[name], value), name
