"""Files that frozen weights are read from: when they change, who opens them, and what they cost."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_base import (
    WIDTH,
    Base,
    after_wrap,
    before_wrap,
    checkpoint,
    in_files,
    policy_for,
    save_file,
)
from measured import run
from test_fork import error_of, in_child

import offload
from offload.tiers.unit import owner_of


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
