"""Byte tokens from text files on disk, read a window at a time: the text never lies in memory."""

from __future__ import annotations

import bisect
import os
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages"}


class DataError(Exception):
    """The data given cannot be trained on; the message says which path and why."""


class TextData:
    """The bytes of some files, one after another, in sorted order.

    Windows depend only on the files' contents and order, `seed`, and the step and micro-batch asked
    for, not on what was asked before: two runs see the same data.
    """

    def __init__(self, files: list[Path], seed: int) -> None:
        """files: read in this order. Raises DataError if none holds any bytes."""
        self._seed = seed
        self._files: list[Path] = []
        self._starts: list[int] = []
        self.size = 0
        """Bytes in all files."""
        for path in files:
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}") from error
            if size > 0:
                self._files.append(path)
                self._starts.append(self.size)
                self.size += size
        if self.size == 0:
            raise DataError(f"the data is empty: {len(files)} files, 0 bytes")

    @property
    def file_count(self) -> int:
        """Files that are not empty."""
        return len(self._files)

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`, across files. Raises DataError if a file has become shorter.

        REQUIRES: 0 <= start and start + count <= size.
        """
        parts: list[bytes] = []
        index = bisect.bisect_right(self._starts, start) - 1
        while count > 0:
            path, offset = self._files[index], start - self._starts[index]
            end = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
            wanted = min(count, end - start)
            try:
                with path.open("rb", buffering=0) as file:
                    part = os.pread(file.fileno(), wanted, offset)
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}") from error
            if len(part) != wanted:
                raise DataError(f"{path}: changed while it was being read")
            parts.append(part)
            start += wanted
            count -= wanted
            index += 1
        return b"".join(parts)

    def windows(self, step: int, micro_batch: int, batch: int, length: int) -> Tensor:
        """Random windows as int64 (batch, length). Raises DataError if the data is shorter."""
        if self.size < length:
            raise DataError(
                f"the data is too small: {self.size} bytes, and one window takes {length}"
            )
        generator = random.Random(f"{self._seed}/{step}/{micro_batch}")
        starts = [generator.randrange(self.size - length + 1) for _ in range(batch)]
        text = bytearray(b"".join(self.read(start, length) for start in starts))
        return torch.frombuffer(text, dtype=torch.uint8).view(batch, length).long()


def open_data(path: str | None, seed: int) -> TextData:
    """The text at `path`: a file, or every text file below a folder; None: Python's own sources.

    Hidden files and folders are left out, and so are files with a NUL among their first bytes.
    Raises DataError if there is nothing to read.
    """
    if path is None:
        return TextData(_standard_library(), seed)
    root = Path(path)
    if root.is_file():
        return TextData([root], seed)
    if not root.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = [file for file in _files_below(root, set()) if _is_text(file)]
    if not files:
        raise DataError(f"{path}: no text files in this folder")
    return TextData(files, seed)


def _standard_library() -> list[Path]:
    folder = sysconfig.get_path("stdlib")
    files = [f for f in _files_below(Path(folder), _NOT_STANDARD_LIBRARY) if f.suffix == ".py"]
    if not files:
        raise DataError(f"{folder}: no Python sources here; give a text with --data")
    return files


def _files_below(root: Path, left_out: set[str]) -> list[Path]:
    """Regular files, sorted by their path relative to `root`; links to folders not followed."""
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [s for s in subfolders if s not in left_out and not s.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found.extend(path for path in paths if path.is_file())
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(1024)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
