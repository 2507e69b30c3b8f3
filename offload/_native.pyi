# ruff: noqa: A002  (the parameters are called so)
"""The native core of offload: memory, swap files and update pipelines.

Failures are raised as the classes of offload.errors. Calls that wait release the GIL. Sizes and
offsets are in bytes, addresses are plain integers.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

from typing_extensions import Buffer

Isa = Literal["scalar", "avx2", "avx512", "neon"]
SqrtRule = Literal["ieee", "rsqrt", "rsqrt-fma", "rsqrt14-fma"]
Rule = Literal["adamw", "adam", "sgd", "adagrad", "rmsprop", "lion"]
ElementType = Literal["float32", "bfloat16", "float16"]
StateFormat = Literal["float32", "bfloat16", "int8"]

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

    def __init__(
        self, budget: int, poison: bool = False, pin: Literal["cuda"] | None = None
    ) -> None:
        """Reserve addresses for `budget` bytes; pages follow as they are first needed.

        With `poison`, memory is filled with 0xFF bytes when it is given back. With `pin`, it is
        page-locked for CUDA; raises UnsupportedError where that cannot be.
        """

    def try_allocate(self, nbytes: int) -> Lease | None:
        """Return a lease, or None when the budget has no room for it."""

    def allocate(self, nbytes: int) -> Lease:
        """Return a lease; raises BudgetError when the budget has no room for it."""

    def usage(self) -> dict[str, int]:
        """Return bytes: budget, in_use, peak, committed, largest_free; and allocations so far."""

    @property
    def note(self) -> str:
        """What could not be had and was done without, such as a NUMA placement; often empty."""

@final
class Transfer:
    """Bytes in flight. It goes on when the last reference to it is dropped."""

    def done(self) -> bool: ...
    def cancel(self) -> None:
        """Do not start what has not started; ``wait`` then raises TransferCancelledError."""

    def wait(self) -> None:
        """Block until done; raises the transfer's error."""

@final
class SwapStore:
    """Objects in swap files, one in each of the directories `dirs`.

    An object is moved in blocks of `block_bytes`. Several directories share the blocks in
    proportion to `rates` (any unit; none: alike). `phase_bytes`, by directory: bytes read or
    written before the other direction has its turn; 0 mixes them. `encrypt`: AES-256-XTS with a key
    that is only in memory.
    """

    default_block_bytes: ClassVar[int]
    def __init__(
        self,
        dirs: str | list[str],
        engine: str = "auto",
        queue_depth: int = 16,
        threads: int = 4,
        block_bytes: int = ...,
        rates: list[float] = ...,
        phase_bytes: list[int] = ...,
        encrypt: bool = False,
    ) -> None: ...
    @staticmethod
    def open_durable(
        dirs: str | list[str],
        name: str,
        create: bool,
        engine: str = "auto",
        queue_depth: int = 16,
        threads: int = 4,
        block_bytes: int = ...,
        rates: list[float] = ...,
        phase_bytes: list[int] = ...,
    ) -> SwapStore:
        """Return a store with named files that outlives the process: new, or as last committed."""

    @staticmethod
    def bounce_bytes_for(dirs: int, queue_depth: int, block_bytes: int) -> int:
        """Return the memory that an encrypted store of these options takes for itself."""

    @property
    def block_bytes(self) -> int: ...
    def footprint(self, nbytes: int) -> int:
        """Return the bytes of the files that an object of `nbytes` takes."""

    def reserve(self, nbytes: int, spare: int) -> None:
        """Grow the files for `nbytes` of objects and `spare` bytes of replaced versions."""

    def create(self, nbytes: int, key: str = "") -> int:
        """Return the id of a new object of `nbytes`, not written yet.

        Objects of a durable store have a `key`, others none.
        """

    def find(self, key: str) -> int | None:
        """Return the id of the object with `key`."""

    def keys(self) -> list[str]: ...
    def nbytes(self, object: int) -> int: ...
    def commit(self) -> None:
        """Make what was written, created and removed so far durable, in one step."""

    def add_memory(self, memory: HostArena) -> None:
        """Name memory that transfers will often use; it may be kept pinned for that."""

    def remove(self, object: int) -> None: ...
    def written(self, object: int, offset: int) -> bool:
        """Return whether the block that holds byte `offset` was ever written."""

    def write(self, object: int, lease: Lease, nbytes: int, demand: bool = False) -> Transfer:
        """Start to write the whole object from the first `nbytes` of `lease`."""

    def read(self, object: int, lease: Lease, nbytes: int, demand: bool = False) -> Transfer:
        """Start to read the whole object to the first `nbytes` of `lease`."""

    def stats(self) -> dict[str, Any]:
        """Return counters since the store was opened.

        Bytes: bytes_read, bytes_written, reserved_bytes, free_bytes. Counts: requests, continued,
        retried, failed, objects. Seconds: busy_seconds. `files`: a list with the same for each
        directory, its `path`, and whether it was found `full`.
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
    @property
    def encrypted(self) -> bool: ...
    @property
    def durable(self) -> bool: ...
    @property
    def bounce_bytes(self) -> int: ...
    def close(self) -> None:
        """End transfers in flight, cancel those not started, close the files.

        Later calls raise OffloadError.
        """

@final
class AtenRounding:
    """How ATen rounds in this process."""

    def __init__(self, fma: bool, sqrt: str) -> None: ...
    @property
    def fma(self) -> bool: ...
    @property
    def sqrt(self) -> SqrtRule: ...

@final
class NormOrder:
    """How ATen sums up norms in this process."""

    def __init__(
        self,
        lanes: int,
        *,
        fuse_lanes: bool,
        rest_group: int,
        fuse_rest: bool,
        fuse_columns: bool,
    ) -> None:
        """See csrc/optim/norm_order.h; `lanes` is 4, 8 or 16."""

    @property
    def lanes(self) -> int: ...
    @property
    def fuse_lanes(self) -> bool: ...
    @property
    def rest_group(self) -> int: ...
    @property
    def fuse_rest(self) -> bool: ...
    @property
    def fuse_columns(self) -> bool: ...

@final
class AdafactorStep:
    """One step of Adafactor on one parameter, pass by pass; see csrc/optim/adafactor.h.

    The caller keeps the memory at the addresses; `mean`, of a matrix, has one fp32 element per
    matrix of the batch and is 0 otherwise.
    """

    def __init__(
        self,
        format: UpdateFormat,
        batch: int,
        rows: int,
        cols: int,
        *,
        param: int,
        narrow: int,
        grad: int,
        factors: Sequence[float],
        row_var: int,
        col_var: int,
        variance: int,
        order: NormOrder,
        fma: bool,
        threads: int,
        isa: str,
    ) -> None: ...
    def param_norm(self) -> float: ...
    def take_statistics(self, weight: float) -> None: ...
    def update_norm(self, mean: int, floor: float) -> float: ...
    def apply(self, mean: int, floor: float, decay: float, step: float) -> None: ...

@final
class UpdateHyper:
    """Hyperparameters of one step of an update rule; `step` counts from 1.

    A rule ignores those that it does not know. `first`: SGD's momentum buffer has no value yet.
    """

    def __init__(
        self,
        rule: str,
        *,
        lr: float = 0.0,
        beta1: float = 0.0,
        beta2: float = 0.0,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        alpha: float = 0.0,
        lr_decay: float = 0.0,
        step: float = 1.0,
        maximize: bool = False,
        amsgrad: bool = False,
        nesterov: bool = False,
        centered: bool = False,
        first: bool = False,
        rounding: AtenRounding,
    ) -> None: ...
    unscale: float
    """Multiplied onto the gradient of a 16-bit parameter in fp32, after all factors."""

    @property
    def state_count(self) -> int:
        """The states of the rule, in the order of torch's names.

        Adam, AdamW: exp_avg, exp_avg_sq, and with amsgrad max_exp_avg_sq. SGD with momentum:
        momentum_buffer. Adagrad: sum. RMSprop: square_avg, with momentum momentum_buffer, with
        centered grad_avg. Lion: exp_avg.
        """

@final
class UpdateFormat:
    """What the arrays of a parameter hold.

    With a 16-bit `param` the gradient has its type too, and an fp32 master copy is one more array.
    """

    def __init__(self, param: str = "float32", state: str = "float32") -> None: ...
    @property
    def param(self) -> ElementType: ...
    @property
    def state(self) -> StateFormat: ...
    @property
    def param_bytes(self) -> int:
        """Bytes of an element of the parameter and of its gradient."""

    @property
    def state_bytes(self) -> int:
        """Bytes of an element of a state; int8 has an fp32 scale per `quant_block` more."""

    @property
    def has_master(self) -> bool: ...

@final
class UpdateOperand:
    """Where one operand of an update is: parameter, gradient, master copy, state or its scales."""

    @staticmethod
    def in_memory(lease: Lease, nbytes: int) -> UpdateOperand: ...
    @staticmethod
    def on_disk(object: int, nbytes: int, *, initial: float = 0.0) -> UpdateOperand:
        """An object of the swap store.

        What of a state was never written is `initial` everywhere; what of a master copy was never
        written is the 16-bit parameter, widened.
        """

    @staticmethod
    def borrowed(address: int, nbytes: int, keep_alive: object) -> UpdateOperand:
        """Memory that `keep_alive` keeps, such as a tensor's.

        The job lets go of `keep_alive` when it is done: before a wait() for it returns, or else
        soon, on the main thread or in a call of this module.
        """

    @staticmethod
    def loaded(object: int, lease: Lease, nbytes: int, *, initial: float = 0.0) -> UpdateOperand:
        """As on_disk(), and read into `lease`, all of it.

        When the job succeeded, object and lease hold the same new version; when it failed, the
        object is as on_disk() leaves it and the lease holds nothing of use.
        """

@final
class UpdateSegment:
    """Elements [begin, end) of a unit: one parameter, with hyperparameters and deferred factors.

    `parameter` is its number in the optimizer, which stochastic rounding depends on. With int8
    states, `begin` is a multiple of `quant_block`.
    """

    def __init__(
        self,
        begin: int,
        end: int,
        hyper: UpdateHyper,
        factors: Sequence[float],
        parameter: int = 0,
    ) -> None: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...

@final
class UpdatePipeline:
    """Read, update and write of parameters and optimizer state in native threads."""

    @staticmethod
    def min_staging_bytes(block_bytes: int = ...) -> int:
        """Return the staging in which a job of any rule and format can be done."""

    def __init__(
        self,
        store: SwapStore | None,
        arena: HostArena | None,
        staging_bytes: int,
        threads: int,
    ) -> None:
        """Take `staging_bytes` of `arena`, used in blocks of `store`.

        0 serves jobs that are wholly in memory, as does no store.
        """

    def submit(
        self,
        numel: int,
        format: UpdateFormat,
        seed: int,
        param: UpdateOperand,
        grad: UpdateOperand,
        master: UpdateOperand | None,
        states: Sequence[UpdateOperand],
        scales: Sequence[UpdateOperand],
        segments: Sequence[UpdateSegment],
    ) -> Transfer:
        """Queue the update of one unit; returns at once.

        Element i of each operand belongs together; widths follow from `format`. `scales` are those
        of int8 states, fp32, one per `quant_block` elements, in memory. `segments` ascend; elements
        in none stay as they are. Jobs in flight at once must share no operand.

        Raises OffloadError: the job makes no sense or needs more staging than there is, the
        pipeline is closed, or an earlier job failed.
        """

    def stats(self) -> dict[str, float]:
        """Return the counts jobs and chunks, and update_seconds summed over the threads."""

    def close(self) -> None:
        """Finish what was submitted and stop the threads; raises the first error, if any."""

quant_block: int

def update(
    hyper: UpdateHyper,
    format: UpdateFormat,
    factors: Sequence[float],
    seed: int,
    parameter: int,
    first: int,
    param: int,
    grad: int,
    master: int,
    states: Sequence[int],
    scales: Sequence[int],
    n: int,
    isa: str,
) -> None:
    """Take one step in place on `n` elements; arrays are given by address, `master` 0 where none.

    `factors` multiply the gradient one after another. `seed`, `parameter` and `first`, the position
    of the first element in its parameter, decide stochastic rounding. `scales`: of int8 states,
    one array each, one fp32 number for `quant_block` elements; else empty.
    """

def fill_state(
    hyper: UpdateHyper, format: UpdateFormat, k: int, value: float, state: int, scale: int, n: int
) -> None:
    """Set the `n` elements of state `k` at address `state` to `value`; `scale` is 0 if none."""

def decode_state(
    hyper: UpdateHyper, format: UpdateFormat, k: int, state: int, scale: int, out: int, n: int
) -> None:
    """Put the `n` elements of state `k` at address `state` as fp32 at `out`."""

def encode_state(
    hyper: UpdateHyper, format: UpdateFormat, k: int, values: int, state: int, scale: int, n: int
) -> None:
    """The other way; bfloat16 is rounded to nearest."""

def isas() -> list[Isa]:
    """Return the names of the kernels that this CPU can run."""

def sqrt_rules(isa: str) -> list[SqrtRule]:
    """Return the square root rules that the kernels of `isa` can follow on this CPU."""

def best_isa() -> Isa:
    """Return the fastest of isas()."""

def measure_disk(dir: str, seconds: float = 2.0) -> dict[str, Any]:
    """Return the rates of the disk of `dir`, measured on an unnamed file there.

    ``read_bps``, ``write_bps``: bytes per second of each alone; ``mixed_bps``: of both together, as
    many bytes each way. ``phases``: mixing is more than 10% slower than taking turns. ``measured``
    is False, with a ``reason``, where there is no direct I/O.
    """
