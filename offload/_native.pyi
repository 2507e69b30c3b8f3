# ruff: noqa: A002  (the parameters are called so)
"""The native core of offload: memory, swap files and update pipelines.

Failures are raised as the classes of offload.errors. Calls that wait release the GIL. Sizes and
offsets are in bytes, addresses are plain integers.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from typing_extensions import Buffer

Isa = Literal["scalar", "avx2", "avx512", "neon"]
SqrtRule = Literal["ieee", "rsqrt", "rsqrt-fma", "rsqrt14-fma"]

@final
class Lease(Buffer):
    """The right to use some bytes of a HostArena; a writable buffer of whole pages.

    The memory returns to the arena when the lease and everything made from its buffer are gone.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...

@final
class HostArena:
    """All host memory of a wrapped model, under one hard budget."""

    def __init__(self, budget: int, poison: bool = False) -> None: ...
    def try_allocate(self, nbytes: int) -> Lease | None:
        """Return a lease, or None when the budget has no room for it."""

    def allocate(self, nbytes: int) -> Lease:
        """Return a lease; raises BudgetError when the budget has no room for it."""

    def usage(self) -> dict[str, int]:
        """Return bytes: budget, in_use, peak, committed, largest_free."""

@final
class Transfer:
    """Bytes in flight. It goes on when the last reference to it is dropped."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Block until done; raises the transfer's error."""

@final
class SwapStore:
    """Objects in an unnamed swap file in ``dir``."""

    block_bytes: ClassVar[int]
    @staticmethod
    def footprint(nbytes: int) -> int:
        """Return the bytes of the file that an object of `nbytes` takes."""

    def __init__(
        self, dir: str, engine: str = "auto", queue_depth: int = 16, threads: int = 4
    ) -> None: ...
    def reserve(self, nbytes: int, spare: int) -> None:
        """Grow the file for `nbytes` of objects and `spare` bytes of replaced versions."""

    def create(self, nbytes: int) -> int:
        """Return the id of a new object of `nbytes`, not written yet."""

    def remove(self, object: int) -> None: ...
    def written(self, object: int, offset: int) -> bool:
        """Return whether the block that holds byte `offset` was ever written."""

    def write(self, object: int, lease: Lease, nbytes: int, demand: bool = False) -> Transfer:
        """Start to write the whole object from the first `nbytes` of `lease`."""

    def read(self, object: int, lease: Lease, nbytes: int, demand: bool = False) -> Transfer:
        """Start to read the whole object to the first `nbytes` of `lease`."""

    def stats(self) -> dict[str, float]:
        """Return counters since the store was opened.

        Bytes: bytes_read, bytes_written, reserved_bytes, free_bytes. Counts: requests, continued,
        retried, failed, objects. Seconds: busy_seconds.
        """

    @property
    def engine(self) -> str: ...
    @property
    def engine_reason(self) -> str: ...
    @property
    def direct(self) -> bool: ...
    @property
    def in_memory(self) -> bool: ...
    @property
    def note(self) -> str: ...
    def close(self) -> None:
        """Wait for what is in flight and close the file; later calls raise OffloadError."""

@final
class AtenRounding:
    """How ATen rounds in this process."""

    def __init__(self, fma: bool, sqrt: str) -> None: ...
    @property
    def fma(self) -> bool: ...
    @property
    def sqrt(self) -> SqrtRule: ...

@final
class AdamWHyper:
    """Hyperparameters of one AdamW step; `step` counts from 1."""

    def __init__(
        self,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: float,
        maximize: bool,
        rounding: AtenRounding,
    ) -> None: ...

@final
class UpdateOperand:
    """Where one operand of an update is."""

    @staticmethod
    def in_memory(lease: Lease, nbytes: int) -> UpdateOperand: ...
    @staticmethod
    def on_disk(object: int, nbytes: int) -> UpdateOperand: ...

@final
class UpdateSegment:
    """Elements [begin, end) of a unit, with their hyperparameters and deferred factors."""

    def __init__(
        self, begin: int, end: int, hyper: AdamWHyper, factors: Sequence[float]
    ) -> None: ...
    @property
    def begin(self) -> int: ...

@final
class UpdatePipeline:
    """Read, update and write of optimizer state in native threads."""

    staging_set_bytes: ClassVar[int]
    def __init__(
        self, store: SwapStore | None, arena: HostArena, staging_sets: int, threads: int
    ) -> None: ...
    def submit(
        self,
        numel: int,
        param: UpdateOperand,
        grad: UpdateOperand,
        exp_avg: UpdateOperand,
        exp_avg_sq: UpdateOperand,
        segments: Sequence[UpdateSegment],
    ) -> Transfer:
        """Queue the update of one unit of `numel` fp32 elements; returns at once."""

    def stats(self) -> dict[str, float]:
        """Return the counts jobs and chunks, and update_seconds summed over the threads."""

    def close(self) -> None:
        """Finish what was submitted and stop the threads; raises the first error, if any."""

def adamw_update(
    hyper: AdamWHyper,
    factors: Sequence[float],
    param: int,
    grad: int,
    exp_avg: int,
    exp_avg_sq: int,
    n: int,
    isa: str,
) -> None:
    """Take one in-place AdamW step on `n` fp32 elements at the given addresses."""

def isas() -> list[Isa]:
    """Return the names of the kernels that this CPU can run."""

def sqrt_rules(isa: str) -> list[SqrtRule]:
    """Return the square root rules that the kernels of `isa` can follow on this CPU."""

def best_isa() -> Isa:
    """Return the fastest of isas()."""
