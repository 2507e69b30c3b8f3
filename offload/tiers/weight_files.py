"""Frozen units whose home is the checkpoint that they came from, instead of the swap files.

1. loading a parameter notes its origin: a range of a file, and which version of the file it was.
2. a spilled frozen unit all of whose parameters have one gets FileRanges as its slab's source, for
   which every read is from the file, straight to the parameters' places. It is read once at once,
   and compared with what the parameters hold where they hold something.
3. the slab is clean as long as nobody writes to it. Whoever does turns it into one that lives in
   swap (Mover.mark_dirty); the file is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from offload import _native
from offload.errors import CheckpointError, CorruptionError, SwapIOError
from offload.policy import Policy
from offload.tiers.unit import OffloadedParam, Unit

if TYPE_CHECKING:
    from offload.tiers.context import RuntimeContext


@dataclass(frozen=True)
class FileOrigin:
    """Where the values of a tensor are: contiguous, in its dtype.

    Attributes:
        name: of the tensor in the file.
        version: of the file when its header was read; see ``_native.ReadOnlyFile``.
    """

    path: str
    name: str
    dtype: torch.dtype
    offset: int
    nbytes: int
    version: tuple[int, int, int]

    def serves(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether its bytes, one after the other, are those of such a tensor."""
        meta = torch.empty_strided(shape, stride, device="meta")
        return self.dtype is dtype and meta.is_contiguous()


_ORIGIN = "_offload_origin"


def note_origin(param: torch.Tensor, origin: FileOrigin | None) -> None:
    """Remember, until the model is wrapped, where `param` was read from; None: forget it."""
    if origin is not None:
        setattr(param, _ORIGIN, origin)
    elif hasattr(param, _ORIGIN):
        delattr(param, _ORIGIN)


def origins_of(unit: Unit) -> dict[OffloadedParam, FileOrigin] | None:
    """Return where the parameters of `unit`, not yet taken over, are in files.

    None where they cannot stay there: some are trained, or narrowed, or from nowhere.
    """
    found = {}
    for param in unit.params:
        origin: FileOrigin | None = getattr(param.param, _ORIGIN, None)
        if origin is None or not can_stay(param, origin):
            return None
        found[param] = origin
    return found


def can_stay(param: OffloadedParam, origin: FileOrigin) -> bool:
    """Whether the bytes in the file can be those of `param`'s place in its slab."""
    kept = not param.trainable and not param.is_narrowed
    return kept and origin.serves(param.shape, param.stride, param.dtype)


class WeightFiles:
    """The files that units of one model are read from.

    Attributes:
        notes: which units were to stay in files and do not, and why.
    """

    def __init__(self, policy: Policy) -> None:
        """Start the engine that reads them."""
        self._engine = _native.FileEngine(policy.io_engine, policy.queue_depth)
        self._block_bytes = policy.block_bytes
        self.notes: list[str] = []
        self._files: dict[tuple[str, tuple[int, int, int]], _native.ReadOnlyFile] = {}

    def ranges(self, origins: Mapping[OffloadedParam, FileOrigin]) -> _native.FileRanges | None:
        """Return what reads the slab of the unit whose parameters are all in `origins`.

        None where they have no elements.

        Raises:
            CheckpointError: a file is not as it was when its header was read.
            SwapIOError: it cannot be opened.
        """
        parts: list[Any] = [
            (self._open(origin), origin.offset, origin.nbytes, param.offset, origin.name)
            for param, origin in origins.items()
            if origin.nbytes
        ]
        return _native.FileRanges(self._engine, parts, self._block_bytes) if parts else None

    def _open(self, origin: FileOrigin) -> _native.ReadOnlyFile:
        key = origin.path, origin.version
        if key not in self._files:
            file = _native.ReadOnlyFile(origin.path)
            if file.version != origin.version:
                raise CheckpointError(
                    f"{origin.path} was changed or replaced since {origin.name} was found in it"
                )
            self._files[key] = file
        return self._files[key]

    @property
    def bytes_read(self) -> int:
        """Since the model was wrapped."""
        return self._engine.bytes_read

    def close(self) -> None:
        """End reads in flight, and let go of the files."""
        self._engine.close()
        self._files.clear()


def take_from_file(
    context: RuntimeContext, unit: Unit, origins: Mapping[OffloadedParam, FileOrigin]
) -> bool:
    """Fill the slab of `unit`, which is being taken over and holds nothing, from files.

    Returns False, and leaves the slab to be filled, where the files cannot be read or do not say
    what the parameters say: these are what counts.
    """
    slab, mover, files = unit.param_slab, context.mover, context.files()
    try:
        source = files.ranges(origins)
        if source is None:
            return False
        mover.load_from(slab, source)
    except (CheckpointError, CorruptionError, SwapIOError) as error:
        files.notes.append(f"{unit.name} was copied to swap: {error}")
        return False
    with torch.no_grad():
        same = all(
            torch.equal(_bytes(param.view(slab)), _bytes(param.param.detach()))
            for param in unit.params
        )
    if not same:
        slab.source = None
        files.notes.append(f"{unit.name} was copied to swap: it is not what its file has")
    return same


def move_to_file(
    context: RuntimeContext, unit: Unit, origins: Mapping[OffloadedParam, FileOrigin]
) -> bool:
    """Have `unit`, which is spilled and frozen, hold what `origins` say, and live there.

    Returns False where it is in use at the moment, and nothing was done.

    Raises:
        CheckpointError, CorruptionError, SwapIOError: the file cannot be read. The unit holds what
            it held.
    """
    slab, mover = unit.param_slab, context.mover
    source = context.files().ranges(origins)
    if source is None or slab.locks:
        return False
    context.detach(unit)
    mover.write_back(slab)
    mover.settle(slab)
    swap_object = slab.swap_object
    mover.load_from(slab, source)
    unit.version += 1
    slab.swap_object = None
    if swap_object is not None and context.space is not None:
        context.space.remove(swap_object)
    return True


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
