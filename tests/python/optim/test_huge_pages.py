"""Huge pages under parameters: the same bytes, and no address outside of the tensor."""

from __future__ import annotations

import ctypes

import pytest
import torch

from offload.optim import huge_pages

HUGE = 2 << 20


@pytest.mark.parametrize("nbytes", [4, HUGE - 4, 3 * HUGE + 12, 9 * HUGE])
def test_bytes_and_address_stay(nbytes: int) -> None:
    tensor = torch.randn(nbytes // 4)
    before, address = tensor.clone(), tensor.data_ptr()
    assert 0 <= huge_pages.collapse(tensor) <= nbytes // HUGE * HUGE
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, before)


class Kernel:
    """Notes what madvise is asked for."""

    def __init__(self, outcome: int) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.outcome = outcome
        self.madvise = self  # as an attribute of the library

    def __call__(self, *arguments: int) -> int:
        self.asked.append((arguments[0], arguments[1], arguments[2]))
        return self.outcome


@pytest.mark.parametrize("outcome", [0, -1], ids=["done", "refused"])
def test_only_whole_huge_pages_inside_are_asked_for(
    outcome: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(outcome)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: kernel)
    tensor = torch.zeros(3 * HUGE)[5:-7]  # four bytes an element, at an odd offset
    found = huge_pages.collapse(tensor)
    ((begin, nbytes, advice),) = kernel.asked
    assert advice == 25
    assert begin % HUGE == 0
    assert nbytes % HUGE == 0
    assert nbytes >= 10 * HUGE
    assert tensor.data_ptr() <= begin
    assert begin + nbytes <= tensor.data_ptr() + tensor.nbytes
    assert found == (nbytes if outcome == 0 else 0)
    huge_pages.collapse(torch.zeros(1000))
    assert len(kernel.asked) == 1
