"""Every error this package raises on purpose.

``OffloadError`` is the base of all of them. Where Python has a builtin for the situation, the
class derives from it too, so ``except MemoryError`` or ``except OSError`` works as usual.
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base class of the errors raised by offload."""


class PolicyError(OffloadError, ValueError):
    """A Policy, a Budget or an argument is not valid."""


class BudgetError(OffloadError, MemoryError):
    """Something does not fit into a memory budget, or the system refused the memory for it."""


class SwapSpaceError(OffloadError, OSError):
    """A swap directory has not enough space left."""


class SwapIOError(OffloadError, OSError):
    """The operating system refused an operation on a swap directory or file."""


class CorruptionError(OffloadError, OSError):
    """The disk returned other bytes than were written (checksum mismatch, truncated file)."""


class CheckpointError(OffloadError, RuntimeError):
    """A file is no checkpoint, or not one of this model."""


class TransferCancelledError(OffloadError):
    """A transfer was cancelled before it started."""


class UnsupportedError(OffloadError):
    """This machine, this build or this kind of tensor cannot do what was asked."""


class SpilledTensorError(OffloadError, RuntimeError):
    """A spilled parameter or gradient was used in a way that needs its bytes in memory."""


class DeviceError(OffloadError, RuntimeError):
    """A device, or its driver, failed an operation."""


class UnorderedAccessError(OffloadError, RuntimeError):
    """Two operations use the same bytes of a device and nothing makes one wait for the other."""


_BY_CODE: dict[str, type[OffloadError]] = {
    "budget": BudgetError,
    "no memory": BudgetError,
    "no space": SwapSpaceError,
    "os error": SwapIOError,
    "corrupt": CorruptionError,
    "unsupported": UnsupportedError,
    "cancelled": TransferCancelledError,
    "device": DeviceError,
    "unordered": UnorderedAccessError,
}


def from_native(code: str, errno: int, path: str, message: str) -> OffloadError:
    """Return the exception for a failure of the native core.

    Args:
        code: the native core's name of the kind of failure.
        errno: the operating system's error number, 0 when no system call failed.
        path: the file or directory concerned, "" when there is none.
        message: one sentence for people.
    """
    kind = _BY_CODE.get(code, OffloadError)
    if issubclass(kind, OSError) and errno != 0:
        error = kind(errno, message)
        if path:
            error.filename = path
        return error
    return kind(message)
