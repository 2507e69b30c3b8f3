"""Swap directories that are missing, not writable, full or in memory."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import training as t

import offload

BUDGET = 16 << 20


def wrap(folder: Path) -> None:
    offload.wrap(t.Stack(), offload.Policy(budget=offload.Budget(host=BUDGET), swap_dir=folder))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(offload.SwapIOError, match="missing") as caught:
        wrap(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(offload.SwapIOError, match="file") as caught:
        wrap(tmp_path / "file")
    assert caught.value.errno == errno.ENOTDIR


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 24 MiB on a loop device."""
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for command in (["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", image, point]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"{command[0]}: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_full_disk_says_path_needed_and_free(small_disk: Path) -> None:
    model = t.Stack()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    policy = offload.Policy(budget=offload.Budget(host=BUDGET), swap_dir=small_disk)
    with pytest.raises(
        offload.SwapSpaceError, match=r"disk: needs \d+ bytes .* \d+ bytes .* free"
    ) as caught:
        offload.wrap(model, policy)
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk) in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.name for p in small_disk.iterdir()] == ["lost+found"]


def test_a_read_only_filesystem_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(offload.SwapIOError, match="disk") as caught:
        wrap(small_disk)
    assert caught.value.errno == errno.EROFS


def test_a_directory_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(offload.SwapIOError, match=str(tmp_path)) as caught:
        wrap(tmp_path)
    assert caught.value.errno == errno.EACCES


def test_a_directory_in_memory_works_and_says_so(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    loop = t.Loop(steps=2)
    t.assert_same(t.plain(t.Stack, loop), t.offloaded(t.Stack, loop, shm, BUDGET))
    notes = " ".join(offload.report(t.wrapped(t.Stack, shm, BUDGET)).notes)
    assert "memory" in notes


CAPPED = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch, offload
import training as t
model = t.Stack(layers=40)
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (4 << 20),) * 2)
before = model.head.weight.sum().item()
try:
    offload.wrap(model, offload.Policy(budget=offload.Budget(host="40MiB"), swap_dir={swap!r}))
except offload.BudgetError as error:
    print(error)
print(model.head.weight.sum().item() == before, type(model.head.weight).__name__)
"""


def test_an_arena_beyond_the_process_limit_is_refused(tmp_path: Path) -> None:
    script = CAPPED.format(tests=str(Path(__file__).parent), swap=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the system refused" in done.stdout
    assert "Budget(host=...)" in done.stdout
    assert done.stdout.endswith("True Parameter\n")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
