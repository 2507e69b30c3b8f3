"""Updates of parameters in ordinary memory, on a bounded number of threads.

A large parameter is a job of an UpdatePipeline, which cuts it into chunks for its threads; small
ones are updated by the calling thread meanwhile, since handing them over costs more than doing
them. The bits do not depend on either.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from offload import _native
from offload.errors import OffloadError
from offload.optim.param_state import Bound, MemoryState, ParamState, ResidentState
from offload.optim.update import Operands, Update, borrowed
from offload.tiers.cpu_share import cpu_share

SMALL = 1 << 14
"""Elements up to which the calling thread updates a parameter itself."""


class MemoryUpdater:
    """Updates parameters whose state is in ordinary memory too."""

    def __init__(self) -> None:
        """Start no threads yet."""
        self._pipeline: _native.UpdatePipeline | None = None
        self._process = 0

    def run(self, updates: Sequence[Update], seed: int) -> None:
        """Take one step for each of `updates`; returns when all are done."""
        placed = [(update, Operands.of(update)) for update in updates]
        transfers = [
            self._submit(update, operands, seed)
            for update, operands in placed
            if operands.numel > SMALL
        ]
        isa = _native.best_isa()
        for update, operands in placed:
            if 0 < operands.numel <= SMALL:
                bound = _bound(update.kept)
                _native.update(
                    update.hyper,
                    update.layout.format,
                    update.factors,
                    seed,
                    update.kept.number,
                    0,
                    operands.param.data_ptr(),
                    operands.grad.data_ptr(),
                    bound.master,
                    bound.states,
                    bound.scales,
                    operands.numel,
                    isa,
                )
        for transfer in reversed(transfers):  # to be woken once, and not for each
            transfer.wait()
        for _, operands in placed:
            operands.publish()

    def _submit(self, update: Update, operands: Operands, seed: int) -> _native.Transfer:
        layout, tensors = update.layout, _bound(update.kept).tensors
        master = None if layout.master is None else borrowed(tensors[layout.master.name])
        return self._threads().submit(
            operands.numel,
            layout.format,
            seed,
            borrowed(operands.param),
            borrowed(operands.grad),
            master,
            [borrowed(tensors[array.name]) for array in layout.states],
            [borrowed(tensors[array.name]) for array in layout.scales],
            [operands.segment(update)],
        )

    def _threads(self) -> _native.UpdatePipeline:
        """Return the pipeline of this process: a forked child needs threads of its own."""
        if self._pipeline is None or self._process != os.getpid():
            self._pipeline = _native.UpdatePipeline(None, None, 0, cpu_share())
            self._process = os.getpid()
        return self._pipeline


def _bound(kept: ParamState) -> Bound:
    if not isinstance(kept, MemoryState | ResidentState) or kept.bound is None:
        raise OffloadError("the state is not in ordinary memory (internal error)")
    return kept.bound
