"""The exception classes and how failures of the native core become them."""

from __future__ import annotations

import errno
import pickle

import pytest

import offload
from offload import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.OffloadError)
]


def test_all_are_public() -> None:
    assert {cls.__name__ for cls in CLASSES} <= set(offload.__all__)
    assert all(getattr(offload, cls.__name__) is cls for cls in CLASSES)


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.PolicyError, ValueError),
        (errors.BudgetError, MemoryError),
        (errors.SwapSpaceError, OSError),
        (errors.SwapIOError, OSError),
        (errors.CorruptionError, OSError),
        (errors.SpilledTensorError, RuntimeError),
        (errors.CheckpointError, RuntimeError),
        (errors.DeviceError, RuntimeError),
        (errors.UnorderedAccessError, RuntimeError),
    ],
)
def test_builtin_bases(cls: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(cls, builtin)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("budget", errors.BudgetError),
        ("no space", errors.SwapSpaceError),
        ("os error", errors.SwapIOError),
        ("corrupt", errors.CorruptionError),
        ("unsupported", errors.UnsupportedError),
        ("device", errors.DeviceError),
        ("unordered", errors.UnorderedAccessError),
        ("invalid", errors.OffloadError),
        ("closed", errors.OffloadError),
        ("of a later version", errors.OffloadError),
    ],
)
def test_from_native(code: str, cls: type[Exception]) -> None:
    error = errors.from_native(code, errno.EIO, "/swap", "pread /swap: it broke")
    assert type(error) is cls
    assert "pread /swap: it broke" in str(error)


def test_os_errors_carry_errno_and_path() -> None:
    error = errors.from_native("no space", errno.ENOSPC, "/swap", "12 bytes needed")
    assert isinstance(error, OSError)
    assert (error.errno, error.filename, error.strerror) == (
        errno.ENOSPC,
        "/swap",
        "12 bytes needed",
    )
    pathless = errors.from_native("os error", errno.EIO, "", "it broke")
    assert isinstance(pathless, OSError)
    assert pathless.filename is None


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_survive_pickling(cls: type[Exception]) -> None:
    """As between the processes of a data loader or a launcher."""
    error = cls(errno.EIO, "why") if issubclass(cls, OSError) else cls("why")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert copy.args == error.args
