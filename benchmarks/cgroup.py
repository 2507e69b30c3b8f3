"""A memory cgroup of one's own: a cap on all memory of a process, page cache included."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_LEAVE_SECONDS = 10.0


class NoCgroupError(Exception):
    """This process may not make a memory cgroup; the message says why."""


class MemoryCgroup:
    """A group's folder, and what its files are called in this version of cgroups."""

    def __init__(self, folder: Path, limit_file: str, peak_file: str) -> None:
        self.folder = folder
        self._limit = folder / limit_file
        self._peak = folder / peak_file
        self._watched: int | None = None  # in v2 a reset is for the descriptor it was written to

    @property
    def enter(self) -> Sequence[str]:
        """A command that enters the group and then runs the command that follows it."""
        procs = shlex.quote(str(self.folder / "cgroup.procs"))
        return ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh"]

    def limit(self, nbytes: int) -> None:
        """Caps the group's memory; the kernel takes pages back to get there.

        Raises OSError where that much cannot be taken back.
        """
        self._limit.write_text(str(nbytes), encoding="ascii")

    def reset_peak(self) -> None:
        """Forgets the highest use so far. Raises OSError in kernels that cannot."""
        if self._watched is None:
            self._watched = os.open(self._peak, os.O_RDWR | os.O_CLOEXEC)
        os.write(self._watched, b"0")

    def peak(self) -> int:
        """The highest use, in bytes, since the last reset."""
        if self._watched is None:
            return int(self._peak.read_text(encoding="ascii"))
        return int(os.pread(self._watched, 64, 0))

    def close(self) -> None:
        """Removes the group, once its last process is gone. Raises OSError if it stays."""
        if self._watched is not None:
            os.close(self._watched)
            self._watched = None
        deadline = time.monotonic() + _LEAVE_SECONDS
        while True:
            try:
                self.folder.rmdir()  # the files in it are the kernel's
                return
            except OSError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)


@contextmanager
def memory_cgroup(name: str) -> Iterator[MemoryCgroup]:
    """A new group `name`, removed after the block: what ran in it must have ended by then.

    Raises NoCgroupError where there is none to be had.
    """
    parent, limit_file, peak_file = place(Path("/proc"))
    group = MemoryCgroup(parent / name, limit_file, peak_file)
    try:
        group.folder.mkdir()
    except OSError as error:
        raise NoCgroupError(f"{group.folder}: {error.strerror}") from error
    try:
        if not (group.folder / limit_file).exists():
            raise NoCgroupError(f"{parent}: its groups have no memory controller")
        yield group
    finally:
        group.close()


def place(proc: Path) -> tuple[Path, str, str]:
    """Where groups may be made, and their files' names: (parent, limit, peak).

    That is below this process's own group in version 1, below the root in version 2, where a group
    with processes can have none with controllers. `proc` is where procfs is mounted.
    """
    own = ""
    for line in (proc / "self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own = path.lstrip("/")
    unified: Path | None = None
    for line in (proc / "mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            parent = Path(point, own)
            parent = parent if parent.is_dir() else Path(point)  # a container may not see it
            return parent, "memory.limit_in_bytes", "memory.max_usage_in_bytes"
        if kind == "cgroup2":
            unified = Path(point)
    if unified is None:
        raise NoCgroupError("no cgroups are mounted")
    return unified, "memory.max", "memory.peak"
