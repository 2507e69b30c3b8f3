from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
from memory_cap import derive_host_budget, format_size, memory_use, parse_size

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
MIB = 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("1 gib", 2**30),
        ("512MiB", 512 * MIB),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("64KB", 64000),
        ("12 B", 12),
        ("1000000", 1000000),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "1XB", "1Gi", "-1GiB", "0", "0.1B", "nan", "inf", "1e"]
)
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_sizes_are_formatted() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 3 * MIB // 2, 2**30, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "1.00 GiB",
        "5120.00 GiB",
    ]


def test_plan_parts_add_up_to_the_cap() -> None:
    plan = derive_host_budget(1000 * MIB, 300 * MIB, 200 * MIB, 50 * MIB)
    assert plan.margin == 40 * MIB
    assert plan.slack == 140 * MIB
    assert plan.arena == 270 * MIB
    assert sum(size for _, size in plan.rows()) == plan.cap
    assert derive_host_budget(300 * MIB, 300 * MIB, 0, 0).arena < 0


def test_memory_use_sees_an_allocation() -> None:
    before = memory_use()
    # Not malloc's: a heap with a free chunk as large has that memory already.
    block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(b"x" * MIB * 64)
    after = memory_use()
    assert after.rss - before.rss > 60 * MIB
    assert after.data - before.data > 60 * MIB
    assert after.peak_rss >= after.rss
    block.close()


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, timeout=300
    )


def test_cap_stops_an_allocation_and_lets_smaller_ones_pass() -> None:
    run = _run(
        "from memory_cap import set_memory_cap, memory_use\n"
        "set_memory_cap(128 * 2**20)\n"
        "a = bytearray(64 * 2**20)\n"
        "print(memory_use().data <= 128 * 2**20)\n"
        "b = bytearray(96 * 2**20)\n"
    )
    assert run.stdout == "True\n"
    assert run.returncode == 1
    assert "MemoryError" in run.stderr


def test_cap_above_a_hard_limit_in_force_is_refused() -> None:
    run = _run(
        "from memory_cap import set_memory_cap\n"
        "set_memory_cap(256 * 2**20)\n"
        "set_memory_cap(512 * 2**20)\n"
    )
    assert "RLIMIT_DATA is already limited to 268435456 bytes" in run.stderr


def test_freed_blocks_return_to_the_system_under_a_cap() -> None:
    run = _run(
        "import ctypes\n"
        "from memory_cap import set_memory_cap, memory_use\n"
        "set_memory_cap(512 * 2**20)\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "libc.malloc.argtypes = [ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "before = memory_use().data\n"
        # Freeing blocks of rising size is what teaches malloc to keep them.
        "for size in range(1, 25):\n"
        "    libc.free(libc.malloc(size * 2**20))\n"
        "blocks = [libc.malloc(8 * 2**20) for _ in range(20)]\n"
        "for block in blocks[:-1]:\n"
        "    libc.free(block)\n"
        "print((memory_use().data - before) // 2**20)\n"
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 9
