"""ActivationChoice: has blocks recomputed, all of them or those that the planner's rule names.

With ``Policy(activations="auto")`` the first forwards are measured, with nothing recomputed: how
many bytes each block has saved, and how long it took without waiting. Then the rule of
`planner/activations.py` is applied, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from offload.planner import BlockCost, Choice, Rates, choose_treatment, step_traffic
from offload.policy import format_bytes
from offload.runtime.block_forward import BlockForward
from offload.tiers.activation_home import ActivationHome
from offload.tiers.activation_range import byte_range
from offload.tiers.context import RuntimeContext
from offload.tiers.disk_profile import DiskProfile

_MEASURED_PASSES = 2
"""Forwards that are measured; the first one also sets libraries and buffers up, so that of each
block the fastest counts."""


class ActivationChoice:
    """Decides which blocks are recomputed.

    Attributes:
        chosen: what the rule said; None: nothing yet, or there is no rule.
    """

    def __init__(
        self,
        context: RuntimeContext,
        home: ActivationHome,
        blocks: Sequence[BlockForward],
        profiles: Sequence[DiskProfile],
        link_rates: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Apply the policy of `context` to `blocks`.

        Args:
            context: of the model.
            home: where its activations are.
            blocks: of the model, in the order of its modules.
            profiles: of the disks, or none.
            link_rates: bytes per second to the device and from it; 0: there is none apart.
        """
        self.chosen: Choice | None = None
        self._context = context
        self._home = home
        self._blocks = list(blocks)
        self._profiles = list(profiles)
        self._link_rates = link_rates
        self._passes = 0
        self._total_bytes = 0  # saved by the largest pass
        self._pass_began = 0
        self._costs: dict[BlockForward, BlockCost] = {}  # in the order of the forward
        mode = context.policy.activations
        self._measuring = mode == "auto" and bool(self._blocks)
        for block in self._blocks:
            block.recompute = mode == "recompute"
            block.observe = self._observe if self._measuring else None

    def begin_pass(self) -> None:
        """An outermost forward begins."""
        if not self._measuring or not torch.is_grad_enabled():
            return
        if self._costs:
            self._passes += 1
            self._note_total()
            if self._passes >= _MEASURED_PASSES:
                self._choose()
        self._pass_began = self._saved()

    def notes(self) -> tuple[str, ...]:
        """Return what was chosen, and why."""
        mode = self._context.policy.activations
        if mode in ("recompute", "auto") and not self._blocks:
            return (
                f'activations="{mode}": the model has no blocks (children of a ModuleList or '
                "Sequential that have children of their own): nothing is recomputed",
            )
        if self.chosen is None:
            return ()
        counts = {what: self.chosen.treatment.count(what) for what in ("recompute", "disk", "host")}
        return (
            f"activations: of {len(self._blocks)} blocks {counts['recompute']} are recomputed, "
            f"{counts['disk']} on disk, {counts['host']} in memory; "
            f"{format_bytes(self.chosen.disk_bytes)} go to disk in a pass, which takes "
            f"{self.chosen.seconds:.3g} s by estimate",
        )

    def _observe(
        self, block: BlockForward, forward: Callable[[], Any], inputs: tuple[Any, ...]
    ) -> Any:
        self._synchronize()
        saved, stalled, begun = self._saved(), self._stalled(), time.perf_counter()
        output = forward()
        self._synchronize()
        seconds = time.perf_counter() - begun - (self._stalled() - stalled)
        nbytes = self._saved() - saved
        known = self._costs.get(block)
        self._costs[block] = BlockCost(
            block.name,
            max(nbytes, known.saved_bytes if known else 0),
            sum(_saved_bytes(value) for value in tree_iter(inputs)),
            min(seconds, known.seconds) if known else seconds,
        )
        return output

    def _synchronize(self) -> None:
        """Wait for a CUDA device, whose work is what is measured."""
        for tier in self._context.tiers:
            if tier.compute.torch.type == "cuda":
                torch.cuda.synchronize(tier.compute.torch)

    def _saved(self) -> int:
        return self._home.saved_bytes + self._home.left_bytes

    def _stalled(self) -> float:
        movers = (self._context.mover, self._home.mover)
        return sum(sum(mover.stall_seconds.values()) for mover in movers)

    def _note_total(self) -> None:
        self._total_bytes = max(self._total_bytes, self._saved() - self._pass_began)

    def _choose(self) -> None:
        self._measuring = False
        costs = list(self._costs.values())
        others = max(0, self._total_bytes - sum(cost.saved_bytes for cost in costs))
        self.chosen = choose_treatment(costs, others, self._rates())
        for block in self._blocks:
            block.observe = None
        for block, treatment in zip(self._costs, self.chosen.treatment, strict=True):
            block.recompute = treatment == "recompute"

    def _rates(self) -> Rates:
        room = self._home.arena_bytes
        to_device, to_host = self._link_rates
        store = self._home.store
        if store is None:
            return Rates(room, 0.0, 0.0, 0.0, to_host, to_device)
        if self._profiles and all(p.measured for p in self._profiles):
            read = sum(p.read_bps for p in self._profiles)
            write = sum(p.write_bps for p in self._profiles)
        else:  # what the store has seen so far, reads and writes together
            stats = store.stats()
            moved = stats["bytes_read"] + stats["bytes_written"]
            read = write = moved / stats["busy_seconds"] if stats["busy_seconds"] else 0.0
        traffic = step_traffic(self._context.plan)
        busy = 0.0 if not read else traffic.read / read + traffic.written / write
        return Rates(room, read, write, busy, to_host, to_device)


def _saved_bytes(value: Any) -> int:
    if type(value) is not torch.Tensor:
        return 0
    extent = byte_range(value)
    return 0 if extent is None else extent[1] - extent[0]
