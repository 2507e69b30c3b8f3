"""Updates of parameters in ordinary memory whose state is in slabs, some of them on disk."""

from __future__ import annotations

from collections.abc import Sequence

from offload.errors import OffloadError
from offload.optim.param_state import ParamState, SlabState
from offload.optim.update import Operands, Update, borrowed
from offload.tiers.state_slabs import operand


def update_slabs(updates: Sequence[Update], seed: int) -> None:
    """Take one step for each of `updates`, whose states are SlabStates of one home.

    Those with state on disk are handed over first, so that the disk begins with the step and the
    others fill the time in which threads wait for it.

    Raises:
        OffloadError: the disk failed; parameters that were not reached are unchanged.
    """
    if not updates:
        return
    home = _slabs(updates[0].kept).run.home
    with home.lock:
        pending = [(u, Operands.of(u)) for u in updates if u.kept.param.numel()]
        pending.sort(key=lambda one: _in_memory(one[0]))
        transfers = []
        for update, operands in pending:
            layout = update.layout
            slabs = _slabs(update.kept).run.of(layout)
            places = [operand(slab) for slab in slabs]
            scales = places[: len(layout.scales)]
            states = places[len(layout.scales) :]
            master = states.pop(0) if layout.master is not None else None
            transfer = home.pipeline.submit(
                operands.numel,
                layout.format,
                seed,
                borrowed(operands.param),
                borrowed(operands.grad),
                master,
                states,
                scales,
                [operands.segment(update)],
            )
            transfers.append((transfer, slabs, operands))
        for transfer, slabs, operands in transfers:
            home.mover.wait(transfer, "update")
            for slab in slabs:
                if slab.lease is not None:
                    home.mover.mark_dirty(slab)
                else:
                    home.mover.mark_on_disk(slab)
            operands.publish()


def _in_memory(update: Update) -> bool:
    return all(slab.lease is not None for slab in _slabs(update.kept).run.of(update.layout))


def _slabs(kept: ParamState) -> SlabState:
    if not isinstance(kept, SlabState):
        raise OffloadError("the state is not in slabs (internal error)")
    return kept
