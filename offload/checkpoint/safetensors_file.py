"""Reading safetensors files tensor by tensor, with no more memory than the tensor's own.

The format: a header's length (8 bytes, little endian), the header (JSON: for each name its dtype,
shape and first and last byte after the header), the bytes. The safetensors package maps a file as
a whole, privately and writable: under a limit on a process's memory all of it counts, and what was
read stays resident until the last tensor is gone. Hence positional reads to where the bytes belong.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.tiers.weight_files import FileOrigin

_MOST_HEADER_BYTES = 100_000_000  # the format's limit
_STAGING_BYTES = 8 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        file: which it is in.
        kind: its dtype, as the format calls it.
        shape: in elements.
        offset: of its first byte in the file.
        nbytes: of its contiguous elements.
        name: in the file.
        version: of the file when its header was read: inode, bytes, last change in ns.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    name: str
    version: tuple[int, int, int]

    def origin(self) -> FileOrigin | None:
        """Return it as a place that a parameter can stay in; None: torch has no such dtype."""
        if self.dtype is None:
            return None
        path = str(self.file.absolute())
        return FileOrigin(path, self.name, self.dtype, self.offset, self.nbytes, self.version)

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype; None: one that torch does not have."""
        return _DTYPES.get(self.kind)

    def read_into(self, target: torch.Tensor, through: torch.dtype | None = None) -> None:
        """Copy its elements to `target`, of its shape (or as many elements).

        The dtypes may differ, as for ``copy_``, and `target` may be on a device; then a few MiB at
        a time pass through memory of their own.
        With `through`, they are converted to that dtype before they are to `target`'s.

        Raises:
            CheckpointError: the file is shorter than it was, or cannot be read.
        """
        if self.dtype is None:
            raise CheckpointError(f"{self.file}: torch has no dtype {self.kind}")
        if target.numel() == 0:
            return
        if not target.is_contiguous():
            whole = torch.empty(target.shape, dtype=target.dtype)
            self.read_into(whole, through)
            target.copy_(whole)
            return
        flat = target.view(-1)
        try:
            fd = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if flat.dtype is self.dtype and flat.device.type == "cpu":
                    self._read(fd, flat.view(torch.uint8).numpy().data, 0)
                else:
                    self._convert(fd, self.dtype, through or self.dtype, flat)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(f"{self.file}: {error.strerror}") from error

    def _convert(
        self, fd: int, dtype: torch.dtype, through: torch.dtype, flat: torch.Tensor
    ) -> None:
        step = _STAGING_BYTES // dtype.itemsize
        staging = torch.empty(min(step, flat.numel()), dtype=dtype)
        buffer = staging.view(torch.uint8).numpy().data
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            self._read(fd, buffer[: part.numel() * dtype.itemsize], first * dtype.itemsize)
            part.copy_(staging[: part.numel()].to(through))

    def _read(self, fd: int, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(fd, [buffer[done:]], self.offset + start + done)
            if got == 0:
                raise CheckpointError(f"{self.file}: the file was truncated while it was read")
            done += got


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return what is in a file, or in a folder as ``save_pretrained`` writes it, by name.

    Raises:
        CheckpointError: there is no such file, or it is not in the format.
    """
    if path.is_file():
        return _index(path) if path.suffix == ".json" else _header(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        return _index(index)
    if single.is_file():
        return _header(single)
    raise CheckpointError(
        f"{path}: expected a .safetensors file, or a folder with {single.name} or {index.name}"
    )


def _index(index: Path) -> dict[str, StoredTensor]:
    places = _object(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: no weight_map")
    for name in {str(name) for name in places.values()}:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
    shards = {str(name): _header(index.parent / str(name)) for name in set(places.values())}
    found = {}
    for key, name in places.items():
        if key not in shards[name]:
            raise CheckpointError(f"{index}: {key} is said to be in {name}, and is not")
        found[key] = shards[name][key]
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            size = status.st_size
            version = status.st_ino, size, status.st_mtime_ns
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise CheckpointError(f"{file}: not a safetensors file, or a truncated one")
            entries = _object(file, stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    entries.pop("__metadata__", None)
    return {
        name: _stored(file, name, entry, 8 + length, version) for name, entry in entries.items()
    }


def _stored(
    file: Path, name: str, entry: Any, start: int, version: tuple[int, int, int]
) -> StoredTensor:
    size = version[1]
    try:
        kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        first, last = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no dtype, shape and data_offsets of {name}") from error
    dtype = _DTYPES.get(kind)
    wanted = last - first if dtype is None else math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or first < 0 or last - first != wanted or start + last > size:
        raise CheckpointError(
            f"{file}: {name} is {kind} {list(shape)} in bytes {first} to {last} of {size - start}; "
            "the file is truncated or damaged"
        )
    return StoredTensor(file, kind, shape, start + first, last - first, name, version)


def _object(file: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    return found
