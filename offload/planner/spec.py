"""What the planner reads and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

_MOST_STATES = 3
"""That any update rule has."""


@dataclass(frozen=True)
class UnitSpec:
    """One unit, in the order in which the model lists it.

    Attributes:
        name: for messages and tables.
        param_bytes: of the slab with all parameters.
        grad_bytes: of the slab with all gradients; 0 when the unit is frozen.
        nested: the unit's module contains other units, so it stays in use while they come and go;
            nothing of it is ever spilled.
        element_bytes: of one parameter element; all of the unit's have one dtype.
        frozen_masters: bytes of each fp32 value that is kept of a frozen parameter in 16 bits, in
            whole pages. No step uses them.
        in_file: its parameters, frozen, can be read from a file of their own and need no swap.
        device: the number of the device where it is used.
    """

    name: str
    param_bytes: int
    grad_bytes: int
    nested: bool = False
    element_bytes: int = 4
    frozen_masters: tuple[int, ...] = ()
    in_file: bool = False
    device: int = 0

    @property
    def state_bytes(self) -> int:
        """What the plan keeps for optimizer state: AdamW's two moments in fp32.

        For 16-bit parameters they are twice as wide, and an fp32 copy of the parameters is a third.
        Of frozen ones, the fp32 values that are kept.
        """
        if self.frozen_masters:
            return sum(self.frozen_masters)
        return self.state_slabs * self.state_slab_bytes

    @property
    def state_slabs(self) -> int:
        """How many slabs ``state_bytes`` are."""
        if self.frozen_masters:
            return len(self.frozen_masters)
        return 3 if self.element_bytes == 2 else 2

    @property
    def scale_bytes(self) -> int:
        """What the scales of int8 states take, which are always in memory: one per 256 elements."""
        nbytes = -(-self.grad_bytes // (self.element_bytes * 256)) * 4
        return _MOST_STATES * (-(-nbytes // 4096) * 4096)

    @property
    def state_slab_bytes(self) -> int:
        """Bytes of one of them, where an optimizer keeps it."""
        return 2 * self.grad_bytes if self.element_bytes == 2 else self.grad_bytes


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

    @property
    def in_file(self) -> bool:
        """Whether the parameters' home is a file of their own."""
        return self.unit.in_file and not self.pin_params

    @property
    def swap_objects(self) -> int:
        """How many slabs have their home in the swap files."""
        params = not (self.pin_params or self.in_file)
        return params + (not self.pin_grads) + self.unit.state_slabs * (not self.pin_state)


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
        staging_bytes: what chunks of the update pass through.
        store_bytes: what the swap store itself takes.
        ring_bytes: host memory through which spilled slabs pass.
        placements: one per unit.
        scale_bytes: host memory for the scales of int8 states, whose states may be on disk. With
            other states it is room for state.
        activation_bytes: host memory that activations pass through, or stay in.
    """

    budget_bytes: int
    staging_bytes: int
    store_bytes: int
    ring_bytes: int
    placements: tuple[Placement, ...]
    scale_bytes: int = 0
    activation_bytes: int = 0

    def host_bytes(self) -> dict[str, int]:
        """Bytes that stay in host memory, by kind."""
        return {
            "parameters": sum(p.unit.param_bytes for p in self.placements if p.pin_params),
            "gradients": sum(p.unit.grad_bytes for p in self.placements if p.pin_grads),
            "optimizer state": sum(p.unit.state_bytes for p in self.placements if p.pin_state),
            "staging": self.staging_bytes + self.store_bytes + self.ring_bytes + self.scale_bytes,
            "activations": self.activation_bytes,
        }

    def disk_bytes(self) -> dict[str, int]:
        """Bytes whose home is the disk, by kind; of activations nothing is planned."""
        return {
            "parameters": sum(p.unit.param_bytes for p in self.placements if not p.pin_params),
            "gradients": sum(p.unit.grad_bytes for p in self.placements if not p.pin_grads),
            "optimizer state": sum(p.unit.state_bytes for p in self.placements if not p.pin_state),
            "staging": 0,
            "activations": 0,
        }

    @property
    def swap_bytes(self) -> int:
        """Bytes whose home is the swap files: all on disk but what lies in files of its own."""
        in_file = (p.unit.param_bytes for p in self.placements if p.in_file)
        return sum(self.disk_bytes().values()) - sum(in_file)

    @property
    def pinned_bytes(self) -> int:
        """Slabs that stay for good, and the update's staging."""
        passing = self.ring_bytes + self.store_bytes + self.activation_bytes
        return sum(self.host_bytes().values()) - passing

    @property
    def free_bytes(self) -> int:
        """What of the budget nothing was planned for."""
        return self.budget_bytes - sum(self.host_bytes().values())

    @property
    def state_room_bytes(self) -> int:
        """Host memory that optimizer state may take, whatever its layout is."""
        return self.host_bytes()["optimizer state"] + self.scale_bytes + self.free_bytes

    @property
    def spills(self) -> bool:
        """True when anything lives on disk."""
        return any(self.disk_bytes().values())
