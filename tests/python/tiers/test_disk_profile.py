"""disk_profile(): measured once per device, and a cache that can only save time."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from offload import SwapIOError, SwapSpaceError, _native
from offload.tiers import disk_profile as module
from offload.tiers.disk_profile import DiskProfile, device_identity, disk_profile

RATES = {"read_bps": 3e9, "write_bps": 1e9, "mixed_bps": 2e9, "phases": False}


class Measure:
    """Counts how often it was asked, and answers as it was told to."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        self.answer = answer
        self.calls = 0

    def __call__(self, folder: str) -> dict[str, Any]:
        self.calls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "offload" / "disks.json"


@pytest.fixture
def measure() -> Measure:
    return Measure({"measured": True, "reason": "", **RATES})


def test_measured_once_per_device(cache: Path, measure: Measure, tmp_path: Path) -> None:
    first = disk_profile(str(tmp_path), measure)
    assert first == DiskProfile(True, 3e9, 1e9, 2e9, False)
    assert first.turns_bps == pytest.approx(1.5e9)
    folder = tmp_path / "another folder of the device"
    folder.mkdir()
    assert disk_profile(str(folder), measure) == first
    assert measure.calls == 1
    assert cache.stat().st_mode & 0o777 == 0o600
    if Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        disk_profile("/dev/shm", measure)
        assert measure.calls == 2
        assert len(json.loads(cache.read_text())["disks"]) == 2
    assert sorted(cache.parent.iterdir()) == [cache, cache.with_suffix(".lock")]


def test_measured_again_when_old(cache: Path, measure: Measure, tmp_path: Path) -> None:
    for age, calls in ((10.0, 1), (module.MAX_AGE_SECONDS + 10.0, 2), (-1000.0, 3)):
        measure.calls = calls - 1 if age == 10.0 else measure.calls
        disk_profile(str(tmp_path), measure)
        data = json.loads(cache.read_text())
        data["disks"][device_identity(str(tmp_path))]["time"] = time.time() - age
        cache.write_text(json.dumps(data))
        before = measure.calls
        disk_profile(str(tmp_path), measure)
        assert measure.calls == before + (age != 10.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 99}',
        '{"version": 1, "disks": 7}',
        "\udcff",
        "DEVICE:7",
        "DEVICE:{}",
        'DEVICE:{"time": NOW, "profile": {"measured": true, "read_bps": 0}}',
        'DEVICE:{"time": NOW, "profile": {"surprise": 1}}',
        'DEVICE:{"time": NOW, "profile": {"measured": true, "read_bps": 1, "write_bps": NaN}}',
        'DEVICE:{"time": NOW, "profile": {"measured": true, "read_bps": "1", "write_bps": 1}}',
    ],
)
def test_a_broken_cache_only_costs_time(
    text: str, cache: Path, measure: Measure, tmp_path: Path
) -> None:
    if text.startswith("DEVICE:"):
        entry = text.removeprefix("DEVICE:").replace("NOW", str(time.time()))
        device = json.dumps(device_identity(str(tmp_path)))
        text = f'{{"version": 1, "disks": {{{device}: {entry}}}}}'
    cache.parent.mkdir(parents=True)
    cache.write_bytes(text.encode(errors="surrogateescape"))
    profile = disk_profile(str(tmp_path), measure)
    assert profile.read_bps == 3e9
    assert str(cache) in profile.note
    assert disk_profile(str(tmp_path), measure).note == ""
    assert measure.calls == 1


def test_a_cache_that_cannot_be_written(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    profile = disk_profile(str(tmp_path), measure)
    assert profile.measured
    assert "was not written" in profile.note


def test_processes_that_start_at_once_measure_once(cache: Path, tmp_path: Path) -> None:
    calls = []

    def slow(folder: str) -> dict[str, Any]:
        calls.append(folder)
        time.sleep(0.3)
        return {"measured": True, "reason": "", **RATES}

    # Each thread has a lock of its own, as a process would.
    with ThreadPoolExecutor(4) as pool:
        profiles = list(pool.map(lambda _: disk_profile(str(tmp_path), slow), range(4)))
    assert len(calls) == 1
    assert profiles == [DiskProfile(True, 3e9, 1e9, 2e9, False)] * 4


def test_a_lock_that_is_held_for_too_long(
    cache: Path, measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    cache.parent.mkdir(parents=True)
    with cache.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert disk_profile(str(tmp_path), measure).measured
    assert measure.calls == 1


def test_without_a_home(measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    for calls in (1, 2):
        profile = disk_profile(str(tmp_path), measure)
        assert profile.measured
        assert "was not written" in profile.note
        assert measure.calls == calls
    assert not list(tmp_path.iterdir())


def test_identity_names_the_filesystem(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    identity = device_identity(str(tmp_path))
    assert identity.startswith(f"{os.major(number)}:{os.minor(number)} ")
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True
    ).stdout.strip()
    # stat(1) calls all three ext filesystems alike.
    assert identity.split(" ")[1] in (kind, *("ext2", "ext3", "ext4")[: 3 * ("ext" in kind)])
    assert device_identity("/proc").split(" ")[1] == "proc"
    with pytest.raises(FileNotFoundError):
        device_identity(str(tmp_path / "missing"))


def test_what_cannot_be_measured(cache: Path, tmp_path: Path) -> None:
    full = Measure(SwapSpaceError(28, "needs 16 MiB, 1 MiB free"))
    profile = disk_profile(str(tmp_path), full)
    assert not profile.measured
    assert "1 MiB free" in profile.note
    buffered = Measure({"measured": False, "reason": "no O_DIRECT", **RATES})
    assert "no O_DIRECT" in disk_profile(str(tmp_path), buffered).note
    assert not cache.exists()
    with pytest.raises(SwapIOError):
        disk_profile(str(tmp_path), Measure(SwapIOError(5, "the disk failed")))


def test_a_real_disk(tmp_path: Path) -> None:
    found = _native.measure_disk(str(tmp_path), 0.3)
    if not found["measured"]:
        pytest.skip(found["reason"])
    for rate in ("read_bps", "write_bps", "mixed_bps"):
        assert 1e5 < found[rate] < 1e12
    assert not list(tmp_path.iterdir())
    with pytest.raises(SwapIOError, match="missing"):
        _native.measure_disk(str(tmp_path / "missing"))
