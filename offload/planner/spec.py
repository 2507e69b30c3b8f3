"""What the planner reads and what it returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnitSpec:
    """One unit, in the order in which the model lists it.

    Attributes:
        name: for messages and tables.
        param_bytes: of the slab with all parameters.
        grad_bytes: of the slab with all gradients; 0 when the unit is frozen. Each of the two
            moments of AdamW takes the same.
        nested: the unit's module contains other units, so it stays in use while they come and go;
            nothing of it is ever spilled.
    """

    name: str
    param_bytes: int
    grad_bytes: int
    nested: bool = False


@dataclass(frozen=True)
class DiskSpec:
    """What the planner knows of the swap directories.

    Attributes:
        block_bytes: of one transfer.
        store_bytes: host memory that the swap store itself takes (for encryption).
        write_time: time of a written byte, as a fraction of a read one's. The default is for a disk
            that was not measured.
    """

    block_bytes: int = 1 << 20
    store_bytes: int = 0
    write_time: float = 0.5


@dataclass(frozen=True)
class Placement:
    """Which slabs of a unit stay in host memory for good; the others have their home on disk."""

    unit: UnitSpec
    pin_params: bool
    pin_grads: bool
    pin_state: bool


@dataclass(frozen=True)
class Traffic:
    """Bytes between host and disk."""

    read: int
    written: int


@dataclass(frozen=True)
class Plan:
    """Where everything lives, and what that costs.

    Attributes:
        budget_bytes: the host budget.
        staging_sets: chunks of optimizer state in flight.
        staging_bytes: what they take in all.
        store_bytes: what the swap store itself takes.
        ring_bytes: host memory through which spilled slabs pass.
        placements: one per unit.
    """

    budget_bytes: int
    staging_sets: int
    staging_bytes: int
    store_bytes: int
    ring_bytes: int
    placements: tuple[Placement, ...]

    def host_bytes(self) -> dict[str, int]:
        """Bytes that stay in host memory, by kind."""
        return {
            "parameters": sum(p.unit.param_bytes for p in self.placements if p.pin_params),
            "gradients": sum(p.unit.grad_bytes for p in self.placements if p.pin_grads),
            "optimizer state": sum(2 * p.unit.grad_bytes for p in self.placements if p.pin_state),
            "staging": self.staging_bytes + self.store_bytes + self.ring_bytes,
        }

    def disk_bytes(self) -> dict[str, int]:
        """Bytes whose home is the disk, by kind."""
        return {
            "parameters": sum(p.unit.param_bytes for p in self.placements if not p.pin_params),
            "gradients": sum(p.unit.grad_bytes for p in self.placements if not p.pin_grads),
            "optimizer state": sum(
                2 * p.unit.grad_bytes for p in self.placements if not p.pin_state
            ),
            "staging": 0,
        }

    @property
    def pinned_bytes(self) -> int:
        """Slabs that stay for good, and the update's staging."""
        return sum(self.host_bytes().values()) - self.ring_bytes - self.store_bytes

    @property
    def spills(self) -> bool:
        """True when anything lives on disk."""
        return any(self.disk_bytes().values())

    def step_traffic(self, micro_batches: int) -> Traffic:
        """Bytes that one optimizer step moves at the most, with `micro_batches` accumulated.

        Parameters on disk are read for each forward and each backward; gradients are written after
        each backward and read back before the next one adds to them; the update reads and writes
        what of parameters, gradients and state is on disk.
        """
        disk = self.disk_bytes()
        params, grads, state = disk["parameters"], disk["gradients"], disk["optimizer state"]
        return Traffic(
            read=2 * micro_batches * params + micro_batches * grads + params + state,
            written=micro_batches * grads + params + state,
        )
