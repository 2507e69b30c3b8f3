from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_data import DataError, TextData, open_data


def test_read_crosses_files(tmp_path: Path) -> None:
    for name, content in (("a", b"0123"), ("b", b""), ("c", b"45"), ("d", b"6789")):
        (tmp_path / name).write_bytes(content)
    data = open_data(str(tmp_path), seed=0)
    assert data.size == 10
    assert data.file_count == 3
    for start in range(10):
        for end in range(start, 11):
            assert data.read(start, end - start) == b"0123456789"[start:end]


def test_folder_is_read_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(b"third")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"second ")
    (tmp_path / "a").write_bytes(b"first ")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    (tmp_path / "binary").write_bytes(b"\x00\x01")
    data = open_data(str(tmp_path), seed=0)
    assert data.read(0, data.size) == b"first second third"


def test_windows_are_the_text_and_depend_on_seed_step_and_micro_batch(text_file: Path) -> None:
    text = text_file.read_bytes()
    data = open_data(str(text_file), seed=7)
    first = data.windows(3, 1, batch=4, length=65)
    assert first.dtype == torch.int64
    assert first.shape == (4, 65)
    for window in first:
        assert bytes(window.tolist()) in text

    other_order = open_data(str(text_file), seed=7)
    other_order.windows(0, 0, batch=2, length=9)
    assert torch.equal(other_order.windows(3, 1, batch=4, length=65), first)
    for step, micro_batch, seed in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        differs = open_data(str(text_file), seed=seed).windows(step, micro_batch, 4, 65)
        assert not torch.equal(differs, first)


def test_a_window_as_long_as_the_data_is_the_data(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abcd")
    window = open_data(str(path), seed=0).windows(0, 0, batch=1, length=4)
    assert bytes(window[0].tolist()) == b"abcd"


def test_default_is_the_standard_library() -> None:
    data = open_data(None, seed=0)
    assert data.file_count > 100
    assert data.size > 1_000_000


def test_missing_empty_and_small_data_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_data(str(tmp_path / "nowhere"), seed=0)
    with pytest.raises(DataError, match="no text files in this folder"):
        open_data(str(tmp_path), seed=0)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(DataError, match="the data is empty: 1 files"):
        open_data(str(empty), seed=0)
    empty.write_bytes(b"abc")
    with pytest.raises(DataError, match="too small: 3 bytes, and one window takes 4"):
        open_data(str(empty), seed=0).windows(0, 0, batch=1, length=4)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abcdef")
    data = TextData([path], seed=0)
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match="changed while it was being read"):
        data.read(1, 4)
