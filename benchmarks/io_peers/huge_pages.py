"""Reserved huge pages for a peer's buffers, while a benchmark runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COUNT = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def reserved_huge_pages(nbytes: int) -> Iterator[bool]:
    """Whether at least `nbytes` of huge pages are free inside the block.

    Reserves what is missing where this process may, and afterwards puts the number back.
    """
    info = _meminfo()
    if "Hugepagesize" not in info:
        yield False
        return
    missing = -(-nbytes // info["Hugepagesize"]) - info["HugePages_Free"]
    if missing <= 0:
        yield True
        return
    before = info["HugePages_Total"]
    try:
        _COUNT.write_text(str(before + missing), encoding="ascii")
    except OSError:
        yield False
        return
    try:
        yield _meminfo()["HugePages_Free"] * info["Hugepagesize"] >= nbytes
    finally:
        _COUNT.write_text(str(before), encoding="ascii")


def _meminfo() -> dict[str, int]:
    """/proc/meminfo, sizes in bytes."""
    found = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, value = line.split(":")
        number, *unit = value.split()
        found[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return found
