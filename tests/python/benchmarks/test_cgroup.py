"""benchmarks/cgroup.py: where a group would be made, and what one does where it may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroup import MemoryCgroup, NoCgroupError, memory_cgroup, place

MIB = 2**20
USE = """
import json, sys
from pathlib import Path
nbytes = int(sys.argv[1])
found = bytearray(nbytes)
for start in range(0, nbytes, 4096):
    found[start] = 1
print(json.dumps(Path("/proc/self/cgroup").read_text()))
"""


def make_proc(folder: Path, cgroup: str, mounts: str) -> Path:
    (folder / "self").mkdir()
    (folder / "self" / "cgroup").write_text(cgroup)
    (folder / "mounts").write_text(mounts)
    return folder


def test_version_1_is_below_the_own_group(tmp_path: Path) -> None:
    point = tmp_path / "memory"
    (point / "mine").mkdir(parents=True)
    mounts = f"cgroup2 /unified cgroup2 rw 0 0\ncgroup {point} cgroup rw,memory 0 0\n"
    proc = make_proc(tmp_path, "5:cpu:/other\n4:hugetlb,memory:/mine\n0::/\n", mounts)
    parent, limit, peak = place(proc)
    assert parent == point / "mine"
    assert (limit, peak) == ("memory.limit_in_bytes", "memory.max_usage_in_bytes")


def test_version_1_in_a_container_is_below_the_mount(tmp_path: Path) -> None:
    point = tmp_path / "memory"
    point.mkdir()
    proc = make_proc(tmp_path, "4:memory:/docker/abc\n", f"cgroup {point} cgroup rw,memory 0 0\n")
    assert place(proc)[0] == point


def test_version_2_is_below_the_root(tmp_path: Path) -> None:
    mounts = "cgroup /cpu cgroup rw,cpu 0 0\ncgroup2 /unified cgroup2 rw 0 0\n"
    proc = make_proc(tmp_path, "5:cpu:/other\n0::/user\n", mounts)
    assert place(proc) == (Path("/unified"), "memory.max", "memory.peak")


def test_nothing_mounted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoCgroupError, match="no cgroups"):
        place(make_proc(tmp_path, "", "proc /proc proc rw 0 0\n"))


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    """A real one, where this process may make it."""
    try:
        with memory_cgroup(f"offload-test-{os.getpid()}") as group:
            yield group
    except NoCgroupError as error:
        pytest.skip(str(error))


def use(group: MemoryCgroup, nbytes: int) -> subprocess.CompletedProcess[str]:
    command = [*group.enter, sys.executable, "-c", USE, str(nbytes)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_process_that_enters_is_counted(group: MemoryCgroup) -> None:
    run = use(group, 64 * MIB)
    assert run.returncode == 0, run.stderr
    assert group.folder.name in json.loads(run.stdout)
    assert 64 * MIB <= group.peak() < 128 * MIB
    group.reset_peak()
    assert group.peak() < 32 * MIB


def test_a_process_above_the_limit_is_killed(group: MemoryCgroup) -> None:
    group.limit(48 * MIB)
    assert use(group, 16 * MIB).returncode == 0
    assert use(group, 96 * MIB).returncode != 0
    assert group.peak() <= 48 * MIB


def test_the_group_is_removed(group: MemoryCgroup) -> None:
    with memory_cgroup(f"{group.folder.name}-removed") as other:
        assert other.folder.is_dir()
    assert not other.folder.exists()


def test_a_name_in_use_is_an_error(group: MemoryCgroup) -> None:
    with (
        pytest.raises(NoCgroupError, match=group.folder.name),
        memory_cgroup(group.folder.name),
    ):
        pass
    assert group.folder.is_dir()
