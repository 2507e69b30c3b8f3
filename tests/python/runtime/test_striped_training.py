"""Training over two swap directories, encrypted or not, gives the same bits as torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import training as t

import offload
from offload import _native
from offload.runtime.wrapped import wrapped

BUDGET = 16 << 20
LOOP = t.Loop(steps=5, micro_batches=1)
BLOCK = "256KiB"
DEPTH = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP threads on few busy cores wait for one another; other tests train with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(one_thread: None) -> t.Outcome:
    return t.plain(t.Stack, LOOP)


@pytest.mark.parametrize("encrypt", [False, True])
def test_striped_training_is_bit_identical(
    encrypt: bool, expected: t.Outcome, tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    bounce = _native.SwapStore.bounce_bytes_for(len(folders), DEPTH, 256 << 10)
    budget = BUDGET + encrypt * bounce
    policy = offload.Policy(
        budget=offload.Budget(host=budget),
        swap_dir=folders,
        encrypt_swap=encrypt,
        io_block_bytes=BLOCK,
        queue_depth=DEPTH,
        calibrate_disk=False,
        debug=True,
    )
    torch.manual_seed(0)
    try:
        model = offload.wrap(t.Stack(), policy)
    except offload.UnsupportedError as error:
        pytest.skip(str(error))
    optimizer = offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1)
    t.assert_same(expected, t.train(model, optimizer, LOOP))
    report = offload.report(model).as_dict()
    assert report["arena_peak_bytes"] <= budget
    store = wrapped(model).context.store
    assert store is not None
    assert (store.encrypted, store.block_bytes) == (encrypt, 256 << 10)
    written = [file["bytes_written"] for file in store.stats()["files"]]
    read = [file["bytes_read"] for file in store.stats()["files"]]
    assert min(written) > max(written) // 2 > 0
    assert min(read) > max(read) // 4 > 0
    offload.unwrap(model)
    assert all(not list(folder.iterdir()) for folder in folders)
