"""Policy and Budget: sizes, refusals that name the culprit, frozen data."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import Budget, OffloadError, Policy, PolicyError
from offload.policy import format_bytes, parse_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512 MB", 512 * 10**6),
        ("512 MiB", 512 * 2**20),
        ("1.5GiB", 3 * GIB // 2),
        ("2 gib", 2 * GIB),
        ("2GB", 2 * 10**9),
        ("1TB", 10**12),
        (" 1TiB ", 2**40),
    ],
)
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "size",
    [
        -1,
        True,
        1.5,
        None,
        b"1",
        "",
        "GiB",
        "-1",
        "1e9",
        "1 G",
        "1 PiB",
        "1 2",
        "1,5GiB",
        "0x10",
        "nan",
        ["1"],
    ],
)
def test_sizes_that_are_refused(size: Any) -> None:
    with pytest.raises(PolicyError, match=r"^the thing: ") as caught:
        parse_bytes(size, "the thing")
    assert str(size) in str(caught.value)


@given(st.integers(0, 2**53), st.sampled_from(["", "B", "KiB", "KB", "GiB", "TB"]))
def test_whole_sizes_are_exact(count: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "KiB": 2**10, "KB": 1000, "GiB": 2**30, "TB": 10**12}[unit]
    if count * factor <= 2**53:
        assert parse_bytes(f"{count}{unit}") == count * factor


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (-2048, "-2.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**30, "1.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_budget() -> None:
    budget = Budget(host="1GiB", disk="2GiB")
    assert (budget.host_bytes, budget.disk_bytes) == (GIB, 2 * GIB)
    assert Budget(host=7).disk_bytes is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"host": 0}, "host"),
        ({"host": "0.4B"}, "host"),
        ({"host": "much"}, "host"),
        ({"host": 1, "disk": -1}, "disk"),
        ({"host": 1, "disk": "1 GO"}, "disk"),
        ({"host": 1, "device": "x"}, "device"),
    ],
)
def test_budgets_that_are_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(PolicyError, match=rf"Budget\({name}="):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"budget": "1GiB"}, r"Policy\(budget=.*1GiB"),
        ({"budget": Budget(host=1, device=1)}, r"Budget\(device="),
        ({"device": "simulated"}, r"Policy\(device='simulated'"),
        ({"io_engine": "aio"}, r"Policy\(io_engine='aio'.*io_uring"),
        ({"queue_depth": 0}, r"Policy\(queue_depth=0\).*1024"),
        ({"queue_depth": 1025}, r"Policy\(queue_depth=1025\)"),
        ({"max_unit_bytes": "big"}, r"Policy\(max_unit_bytes=.*big"),
    ],
)
def test_policies_that_are_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(PolicyError, match=name):
        Policy(**{"budget": Budget(host=1), **arguments})


ON_DEVICE = Budget(host=1, device=1)


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ([], r"Policy\(device=\[\]\): name a device"),
        (["cuda:0", "cuda:1", "cuda:0"], "'cuda:0' is named twice"),
        (["cuda", "cuda"], "'cuda' is named twice"),
        (["cuda:0", "cpu"], "all be CUDA devices, or all simulated"),
        (["cuda:0", "simulated"], "all be CUDA devices, or all simulated"),
        (["cpu", "cpu"], "all be CUDA devices, or all simulated"),
        (["cuda:0", "mps"], r"device=\['cuda:0', 'mps'\]\): expected"),
        (["simulated:unified"] * 2, "host's memory can only be the only one"),
        ([["cuda:0"]], "expected"),
    ],
)
def test_lists_of_devices_that_are_refused(devices: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        Policy(budget=ON_DEVICE, device=devices)


def test_lists_of_devices() -> None:
    several = Policy(budget=ON_DEVICE, device=["cuda:0", "cuda:3"])
    assert several.device_names == ("cuda:0", "cuda:3")
    assert several.is_cuda
    assert not several.is_cpu
    assert several.paces == ()
    with pytest.raises(PolicyError, match=r"needs Budget\(device="):
        Policy(budget=Budget(host=1), device=("cuda:0", "cuda:1"))
    simulated = Policy(budget=ON_DEVICE, device=["simulated", "simulated"])
    assert (simulated.paces, simulated.is_cuda) == (("timed", "timed"), False)
    assert Policy(budget=Budget(host=1), device=["cpu"]).is_cpu
    one = Policy(budget=ON_DEVICE, device=["simulated:latest"])
    assert one.paces == Policy(budget=ON_DEVICE, device="simulated:latest").paces


def test_policy_error_is_a_value_error_of_this_package() -> None:
    assert issubclass(PolicyError, ValueError)
    assert issubclass(PolicyError, OffloadError)


def test_frozen() -> None:
    policy = Policy(budget=Budget(host=1))
    with pytest.raises(FrozenInstanceError):
        policy.queue_depth = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        policy.budget.host = 3  # type: ignore[misc]
    assert policy == Policy(budget=Budget(host=1))


def test_swap_dirs() -> None:
    budget = Budget(host=1)
    assert Policy(budget).swap_dirs == ()
    assert Policy(budget, swap_dir="a/b").swap_dirs == ("a/b",)
    assert Policy(budget, swap_dir=Path("a") / "b").swap_dirs == ("a/b",)
    assert Policy(budget, swap_dir=["a", Path("b")]).swap_dirs == ("a", "b")
    with pytest.raises(PolicyError, match="named twice"):
        Policy(budget, swap_dir=["a", Path("a")])
    with pytest.raises(PolicyError, match="name a directory"):
        Policy(budget, swap_dir=[])


def test_io_block_bytes() -> None:
    budget = Budget(host=1)
    assert Policy(budget).block_bytes == 2**20
    assert Policy(budget, io_block_bytes="64KiB").block_bytes == 2**16
    for wrong in ("32KiB", "3MiB", "32MiB", 0):
        with pytest.raises(PolicyError, match="power of two"):
            Policy(budget, io_block_bytes=wrong)


def test_unit_limit() -> None:
    assert Policy(Budget(host="24MiB")).unit_limit == 2**20
    assert Policy(Budget(host="24MiB"), max_unit_bytes="3KiB").unit_limit == 3072


def test_units_as_one_string_are_refused() -> None:
    with pytest.raises(PolicyError, match="list of module names"):
        Policy(budget=Budget(host=1 << 20), units="blocks")
