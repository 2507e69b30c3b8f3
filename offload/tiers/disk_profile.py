"""DiskProfile: what a swap directory's disk can do, measured once per device and remembered.

The cache is ``disks.json`` in ``$XDG_CACHE_HOME/offload`` (``~/.cache/offload``). It only saves
time: when it cannot be read or written the disk is measured again, and the profile's note says why.
Of several processes that start at once, one measures and the others wait for what it finds.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offload import _native
from offload.errors import BudgetError, SwapSpaceError

MAX_AGE_SECONDS = 30 * 24 * 3600
"""Disks age and fill up: an older measurement is made again."""

LOCK_SECONDS = 60.0
"""How long to wait for another process that measures, before measuring beside it."""

_MOUNTS = Path("/proc/self/mountinfo")
_VERSION = 1
_IDENTITY_FILES = ("device/model", "device/serial", "device/wwid", "serial", "wwid", "dm/uuid")


@dataclass(frozen=True)
class DiskProfile:
    """Rates of a disk.

    Attributes:
        measured: False where they could not be, and the rates are 0.
        read_bps: bytes per second, nothing being written.
        write_bps: bytes per second, nothing being read.
        mixed_bps: bytes per second of both directions together, as many bytes each way.
        phases: reads and writes at once are more than 10% slower than in turns.
        note: for people; "" when there is nothing to say.
    """

    measured: bool
    read_bps: float = 0.0
    write_bps: float = 0.0
    mixed_bps: float = 0.0
    phases: bool = False
    note: str = ""

    @property
    def turns_bps(self) -> float:
        """Bytes per second of both directions together, one at a time."""
        return 2 / (1 / self.read_bps + 1 / self.write_bps)


def disk_profile(
    folder: str, measure: Callable[[str], dict[str, Any]] = _native.measure_disk
) -> DiskProfile:
    """Return the profile of the disk of `folder`, measuring it (about two seconds) if need be.

    A disk without the room or the memory to measure it has a profile that is not ``measured``.

    Raises:
        SwapIOError: the folder cannot be used, or the disk failed.
    """
    try:
        device = device_identity(folder)
    except OSError:
        device = ""  # measuring it says what is wrong with the folder
    cached, _ = _load(device)
    if cached is not None:
        return cached
    with _alone():
        cached, complaint = _load(device)  # of whoever measured while this process waited
        return cached or _measured(folder, device, measure, complaint)


def _measured(
    folder: str, device: str, measure: Callable[[str], dict[str, Any]], complaint: str
) -> DiskProfile:
    try:
        found = measure(folder)
    except (SwapSpaceError, BudgetError) as error:
        return DiskProfile(False, note=f"{folder}: the disk was not measured: {error}")
    if not found["measured"]:
        return DiskProfile(False, note=f"{folder}: the disk was not measured: {found['reason']}")
    profile = DiskProfile(
        True, found["read_bps"], found["write_bps"], found["mixed_bps"], found["phases"]
    )
    complaint = _store(device, profile) or complaint
    return replace(profile, note=complaint) if complaint else profile


def device_identity(folder: str) -> str:
    """Return a name that is the same for every folder of one filesystem on one device.

    It is the device's number, the filesystem's type and source, and what the device says of itself.

    Raises:
        OSError: the folder does not exist.
    """
    number = Path(folder).stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    parts = [device, _filesystem(Path(folder).resolve())]
    block = Path("/sys/dev/block") / device
    for base in (block, block / ".."):  # a partition's disk has the serial number
        for name in _IDENTITY_FILES:
            with suppress(OSError):  # most devices have only some of them
                parts.append((base / name).read_text(errors="replace").strip())
    return " ".join(dict.fromkeys(part for part in parts if part))


def _filesystem(folder: Path) -> str:
    """Return "type source" of the filesystem that `folder` is on, "" when that is not to be had.

    The number of a network's or a stacked filesystem is given anew at each mount: this is not.
    """
    found, depth = "", 0
    with suppress(OSError), _MOUNTS.open(errors="surrogateescape") as mounts:
        for line in mounts:
            mount, _, rest = line.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount.split(" ")[4])
            if len(Path(point).parts) >= depth and folder.is_relative_to(point):
                found, depth = " ".join(rest.split(" ")[:2]), len(Path(point).parts)
    return found


def _cache_path() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # to be ignored, says the specification
        base = Path.home() / ".cache"
    return base / "offload" / "disks.json"


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other processes from measuring meanwhile: each would find its share of the disk.

    Where there is no place for a lock, or it is held for too long, go on without.
    """
    try:
        path = _cache_path().with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except (OSError, RuntimeError):
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
            except OSError:
                pass  # a filesystem without locks
            break
        yield
    finally:
        with suppress(OSError):  # also for a forked child, which has the descriptor too
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _read_cache() -> dict[str, Any]:
    """Return the cache's entries; raises OSError or ValueError when there are none to be had."""
    data = json.loads(_cache_path().read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        raise ValueError("it is of another version")
    disks = data.get("disks")
    if not isinstance(disks, dict):
        raise ValueError("it has no disks")
    return disks


def _load(device: str) -> tuple[DiskProfile | None, str]:
    """Return what is remembered of `device`, or None and what was wrong with the cache."""
    try:
        entry = _read_cache().get(device)
        if entry is None or not 0 <= time.time() - entry["time"] < MAX_AGE_SECONDS:
            return None, ""
        profile = DiskProfile(**entry["profile"])
        rates = (profile.read_bps, profile.write_bps, profile.mixed_bps)
        if not (profile.measured and all(math.isfinite(r) and r > 0 for r in rates)):
            raise ValueError("its rates are not above 0")
        return profile, ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return None, f"the cache of disk rates, {_name()}, was not used: {error}"


def _store(device: str, profile: DiskProfile) -> str:
    """Remember `profile`; return what went wrong, or ""."""
    try:
        path = _cache_path()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            disks = _read_cache()
        except (OSError, ValueError):
            disks = {}  # made anew
        disks[device] = {"time": time.time(), "profile": asdict(profile)}
        # Mode 0600; of two processes at once, the last one's file is there as a whole.
        handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "disks": disks}, file, indent=1)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise
    except (OSError, RuntimeError) as error:
        return f"the cache of disk rates, {_name()}, was not written: {error}"
    return ""


def _name() -> str:
    try:
        return str(_cache_path())
    except RuntimeError:  # no home directory
        return "disks.json"
