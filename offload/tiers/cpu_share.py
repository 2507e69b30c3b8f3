"""How many threads this process should compute with on the CPU.

Three things limit it: the cores that the process may run on (affinity), the CPU time that its
control groups give it (quota, version 1 or 2), and the other ranks of a distributed job on this
machine, which are after the same cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

_RANKS = "LOCAL_WORLD_SIZE"
"""Set by torchrun: how many ranks it started on this machine."""


def cpu_share(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Return how many threads to compute with, at least 1.

    Ranks share what their launcher may use. A rank that was bound to some cores uses no others.

    Args:
        root: where /proc and the control groups are looked for.
        environ: the process's environment.
    """
    own = os.sched_getaffinity(0)
    ranks = _ranks(environ)
    shared = float(len(own | _launchers_cores()) if ranks > 1 else len(own))
    shared = min(shared, cpu_quota(root))
    return max(1, min(len(own), int(shared / ranks)))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the cores' worth of CPU time that this process's control groups allow; may be inf.

    Files that are missing or unreadable limit nothing: there are systems without control groups.
    """
    quota = math.inf
    try:
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return quota
    paths = _paths(groups)
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        if kind not in ("cgroup", "cgroup2"):
            continue
        controller = "" if kind == "cgroup2" else "cpu"
        if controller and controller not in options.split(" ")[-1].split(","):
            continue
        if controller not in paths:
            continue
        mounted, at = fields.split(" ")[3:5]
        quota = min(quota, _least(root / at.lstrip("/"), _below(paths[controller], mounted)))
    return quota


def _ranks(environ: Mapping[str, str]) -> int:
    value = environ.get(_RANKS, "")
    return max(1, int(value)) if value.isascii() and value.isdigit() else 1


def _launchers_cores() -> set[int]:
    """The cores of the parent process, which started the ranks; none where it cannot be asked."""
    try:
        return os.sched_getaffinity(os.getppid())
    except OSError:
        return set()


def _paths(groups: list[str]) -> dict[str, str]:
    """The process's group by controller; "" stands for the one hierarchy of version 2."""
    paths: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _below(path: str, mounted: str) -> list[str]:
    """The folders from a mount's own to that of the group `path`.

    In a container only part of the hierarchy is mounted; a group outside of it is the mount itself.
    """
    if mounted != "/":
        if path != mounted and not path.startswith(mounted + "/"):
            return []
        path = path[len(mounted) :]
    parts = [part for part in path.split("/") if part]
    return [] if ".." in parts else parts


def _least(mount: Path, parts: list[str]) -> float:
    """The least quota of the group and of those that it is in."""
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return min(_quota_of(folder) for folder in folders)


def _quota_of(folder: Path) -> float:
    try:
        text = (folder / "cpu.max").read_text().split()
    except OSError:
        try:
            text = [
                (folder / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period")
            ]
        except OSError:
            return math.inf
    if len(text) != 2 or text[0] in ("max", "-1"):
        return math.inf
    return int(text[0]) / int(text[1])
