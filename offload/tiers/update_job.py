"""UpdateJob: one step of the trainable parameters of a unit, with all that it works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from offload import _native
from offload.tiers.slab import Arrival, Slab
from offload.tiers.state_layout import StateLayout
from offload.tiers.state_slabs import operand
from offload.tiers.unit import Unit


@dataclass(eq=False)
class UpdateJob:
    """A step whose gradients, factors and hyperparameters are final.

    Attributes:
        unit: its gradients are in their slab, or on the device.
        grads: their slab.
        layout: of the state.
        state: its slabs, in the order of ``layout.arrays``.
        seed: of stochastic rounding.
        segments: one per parameter that has a gradient, ascending.
        on_device: it is to run on the device.
        launched: what launching it there returned, once that was done.
    """

    unit: Unit
    grads: Slab
    layout: StateLayout
    state: list[Slab]
    seed: int
    segments: list[_native.UpdateSegment]
    on_device: bool = False
    launched: list[None] = field(default_factory=list)

    @property
    def scales(self) -> list[Slab]:
        """Those of int8 states."""
        return self.state[: len(self.layout.scales)]

    @property
    def master(self) -> Slab | None:
        """The fp32 copy of 16-bit parameters."""
        return None if self.layout.master is None else self.state[len(self.layout.scales)]

    @property
    def states(self) -> list[Slab]:
        """Those of the rule."""
        return self.state[-len(self.layout.states) :] if self.layout.states else []

    @property
    def slabs(self) -> list[Slab]:
        """All that it uses, the parameters first."""
        return [self.unit.param_slab, self.grads, *self.state]

    @property
    def results(self) -> list[Slab]:
        """What it changes, the parameters first: they are needed soonest."""
        return [self.unit.param_slab, *self.state]

    def prepare(
        self,
        pipeline: _native.UpdatePipeline,
        params: _native.UpdateOperand,
        after: Sequence[Arrival],
    ) -> partial[_native.Transfer]:
        """Return what hands it to `pipeline`: a C function with its arguments, see Updates._submit.

        The other operands are where their slabs are now, once `after` have ended.
        """
        return partial(
            pipeline.submit,
            self.unit.grad_bytes // self.unit.params[0].dtype.itemsize,
            self.layout.format,
            self.seed,
            params,
            operand(self.grads),
            None if self.master is None else operand(self.master),
            [operand(slab) for slab in self.states],
            [operand(slab) for slab in self.scales],
            self.segments,
            after,
        )
