"""cpu_share(): on made-up control groups, affinities and numbers of ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from offload.tiers.cpu_share import cpu_quota, cpu_share

V2 = "29 22 0:25 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "31 30 0:28 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = "33 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def system(folder: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    proc = folder / "proc/self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text(mounts)
    (proc / "cgroup").write_text(groups)
    for name, content in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"a/b/cpu.max": "250000 100000\n"}, 2.5),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ({"a/b/cpu.max": "700000 100000\n", "cpu.max": "200000 100000\n"}, 2.0),
        ({"c/cpu.max": "100000 100000\n"}, math.inf),
    ],
)
def test_version_2(files: dict[str, str], expected: float, tmp_path: Path) -> None:
    assert cpu_quota(system(tmp_path, V2, "0::/a/b\n", files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"a/cpu.cfs_quota_us": "-1\n", "a/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"a/cpu.cfs_quota_us": "150000\n", "a/cpu.cfs_period_us": "50000\n"}, 3.0),
        ({"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}, 1.5),
    ],
)
def test_version_1(files: dict[str, str], expected: float, tmp_path: Path) -> None:
    files = {f"cpu,cpuacct/{name}": content for name, content in files.items()}
    groups = "5:memory:/other\n4:cpu,cpuacct:/a\n0::/\n"
    root = system(tmp_path, OTHER + V1.format(root="/"), groups, files)
    assert cpu_quota(root) == expected


@pytest.mark.parametrize("group", ["/docker/1234/inner", "/docker/1234", "/elsewhere"])
def test_in_a_container_that_sees_part_of_the_hierarchy(group: str, tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    mounts = V1.format(root="/docker/1234")
    root = system(tmp_path, mounts, f"4:cpu,cpuacct:{group}\n", files)
    assert cpu_quota(root) == 4.0


def test_both_versions_at_once(tmp_path: Path) -> None:
    files = {
        "cpu.max": "500000 100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    root = system(tmp_path, V2 + V1.format(root="/"), "4:cpu,cpuacct:/\n0::/\n", files)
    assert cpu_quota(root) == 2.0


def test_without_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


def cores(monkeypatch: pytest.MonkeyPatch, own: int, parents: int) -> None:
    """Let this process have `own` cores and its parent `parents`."""
    affinity = {0: set(range(own)), os.getppid(): set(range(parents))}
    monkeypatch.setattr(os, "sched_getaffinity", affinity.__getitem__)


@pytest.mark.parametrize(
    ("own", "parents", "quota", "ranks", "expected"),
    [
        (8, 8, None, None, 8),
        (8, 64, None, None, 8),
        (8, 8, 250000, None, 2),  # what a quota allows, not what it would throttle
        (8, 8, 50000, None, 1),
        (64, 64, None, "8", 8),
        (8, 64, None, "8", 8),  # bound to cores of its own
        (32, 64, None, "8", 8),  # bound to a node that others share
        (2, 64, None, "8", 2),
        (4, 4, None, "8", 1),
        (64, 64, 1600000, "4", 4),  # the quota is of all ranks together
        (8, 8, None, "0", 8),
        (8, 8, None, "many", 8),
    ],
)
def test_share(
    own: int,
    parents: int,
    quota: int | None,
    ranks: str | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    cores(monkeypatch, own, parents)
    files = {} if quota is None else {"cpu.max": f"{quota} 100000"}
    root = system(tmp_path, V2, "0::/\n", files)
    environ = {} if ranks is None else {"LOCAL_WORLD_SIZE": ranks}
    assert cpu_share(root, environ) == expected


def test_of_this_process() -> None:
    assert 1 <= cpu_share() <= len(os.sched_getaffinity(0))
