# ruff: noqa: A002  (the parameters are called so)
"""The native core of offload: memory, devices, swap files and update pipelines.

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
Stream = Literal["compute", "h2d", "d2h"]
Access = Literal["read", "write"]
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

def crc32c(lease: Lease, nbytes: int) -> int:
    """Return the CRC32C of the first `nbytes` of `lease`."""

def crc32c_at(address: int, nbytes: int, before: int = 0) -> int:
    """Return the CRC32C of `nbytes` at `address`, after others whose CRC32C is `before`."""

@final
class HostArena:
    """All host memory of a wrapped model, under one hard budget."""

    def __init__(
        self,
        budget: int,
        poison: bool = False,
        pin: Device | Sequence[Device] | Literal["cuda"] | None = None,
    ) -> None:
        """Reserve addresses for `budget` bytes; pages follow as they are first needed.

        With `poison`, memory is filled with 0xFF bytes when it is given back. With `pin`, it is
        page-locked: for one or several Devices of a kind, which may then copy from and to it, or
        for CUDA at large; raises UnsupportedError where that cannot be.
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
class Event:
    """A point in a stream of a device."""

    @property
    def stream(self) -> Stream: ...

@final
class Device:
    """Memory apart from the host's, with copies in streams.

    What is submitted to a stream is done in order, later. Until an event recorded after it is
    complete a copy may read its source, and its destination holds anything: keep both leases until
    then. With `check`, two accesses that no wait orders raise UnorderedAccessError: in the call
    that completes the conflict, or in the next one where that was a finalizer.

    Streams: "compute" is where the model computes, "h2d" and "d2h" copy. On the simulated device
    the compute stream is the calling thread.
    """

    @property
    def name(self) -> str: ...
    @property
    def computes_on_host(self) -> bool:
        """Whether torch's CPU operators compute on this device's memory."""
    @property
    def host_access(self) -> dict[str, bool]:
        """How it gets at the host's memory, as cuda_host_access tells."""

    def memory_info(self) -> tuple[int, int]:
        """Return the bytes that are free, and all."""

    def copy_to_device(
        self,
        dst: DeviceLease,
        src: Lease,
        nbytes: int,
        *,
        dst_offset: int = 0,
        src_offset: int = 0,
        stream: Stream = "h2d",
    ) -> None:
        """Submit a copy, after the former uses of `dst`. The arena of `src` has this `pin`."""

    def copy_to_host(
        self,
        dst: Lease,
        src: DeviceLease,
        nbytes: int,
        *,
        dst_offset: int = 0,
        src_offset: int = 0,
        stream: Stream = "d2h",
    ) -> None:
        """Submit a copy. It waits for nothing: make the stream wait for what wrote `src`."""

    def fill(self, dst: DeviceLease, value: int, stream: Stream = "compute") -> None:
        """Submit setting every byte to `value`, after the former uses of `dst`."""

    def record(self, stream: Stream) -> Event:
        """Return the point after all that was submitted to the stream so far."""

    def wait(self, stream: Stream, event: Event, why: str) -> None:
        """Let what is submitted to `stream` from now on start after `event`.

        Returns at once, but for the compute stream of the simulated device. `why` names the reason
        in `stats()["waits"]`.
        """

    def query(self, event: Event) -> bool:
        """Return whether the event is complete."""

    def synchronize(self, event: Event) -> None:
        """Block until the event is complete; counted as one of `host_waits`."""

    def drain(self) -> None:
        """Block until all that was submitted is done."""

    def use_host(self, lease: Lease, access: Access, label: str = "") -> None:
        """Declare to the checker that the host reads or writes the lease now."""

    def set_compute_stream(self, handle: int) -> None:
        """Take a stream of CUDA's for the compute stream, such as torch's current stream.

        What is submitted to it from now on starts after all that went to the former one.
        """

    @property
    def compute_stream(self) -> int:
        """The handle that was taken last, at first 0: the default stream."""

    def omit_waits(self, why: str) -> None:
        """Leave out the waits of this reason from now on: for tests that each is needed."""

    def stats(self) -> dict[str, Any]:
        """Return counters since the device was made.

        Bytes: h2d_bytes, d2h_bytes, d2d_bytes. Counts: copies, events, host_waits, conflicts, and
        `waits`, a dict of reason to waits of one stream for another.
        """

def simulated_device(
    memory_bytes: int,
    *,
    pace: Literal["timed", "earliest", "latest"] = "timed",
    delay_s: float = 0.0,
    bytes_per_s: float = 0.0,
    check: bool = True,
    unified: bool = False,
) -> Device:
    """Return a device without one, which obeys CUDA's rules of order.

    The destination of a copy that has not ended is filled with 0xFF bytes, its source is read when
    it ends. `pace` says when that is: "timed" takes `delay_s` and `bytes_per_s` (0: no limit) for
    each copy, "earliest" ends it at once, "latest" not before somebody waits for it. With
    `unified`, host memory that is pinned for it is its memory too.
    """

has_cuda: bool  # whether this build has CUDA

def cuda_host_access(index: int) -> dict[str, bool]:
    """Return how a GPU gets at the host's memory.

    "integrated": its memory is the host's; "same_address": pinned host memory has its address there
    too; "unified": both, so nothing needs to be copied; "pageable": it can use memory that is not
    pinned, "by_host_tables": with the host's page tables. Raises as cuda_device does.
    """

def cuda_device(index: int = 0, *, check: bool = False) -> Device:
    """Return a GPU; raises UnsupportedError where this build or machine has none."""

@final
class DeviceView(Buffer):
    """What tensors on a lease are made from; its use by the compute stream lasts as long as they.

    A writable buffer on the simulated device (``torch.frombuffer``), else an object with
    ``__cuda_array_interface__`` (``torch.as_tensor``): `nbytes` bytes of the lease.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

class DeviceSpan:
    """A range of device memory that transfers go to or come from."""

@final
class DeviceLoan(DeviceSpan):
    """Memory of a tensor's, or of `owner`'s, for one transfer, which keeps it until that is over.

    What the compute stream was given before is a use of it: the copy comes after that.
    """

    def __init__(
        self, device: Device, address: int, nbytes: int, owner: object, label: str = ""
    ) -> None: ...
    def use(self, stream: Stream, access: Access) -> None:
        """Declare to the checker that work submitted to the stream now uses the memory."""

@final
class DeviceLease(DeviceSpan):
    """The right to use some bytes of a DeviceArena; given back with the last reference.

    The next owner's streams wait for the uses that were noted, so a lease may be dropped while work
    on it is still in flight.
    """

    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def label(self) -> str: ...
    def acquire(self, stream: Stream) -> None:
        """Make the stream wait for the uses of the range by its former owners."""

    def note_use(self, event: Event) -> None:
        """Let nobody else use the range before `event`."""

    @property
    def is_open(self) -> bool:
        """Whether a view of it lives."""

    def is_idle(self) -> bool:
        """Whether no view of it lives, and all uses have ended; then the host comes after them."""

    def wait_for_uses(self) -> None:
        """Wait until all that was submitted to use it has ended."""

    def use(self, stream: Stream, access: Access) -> None:
        """Declare to the checker that work submitted to the stream now uses the lease."""

    def view(
        self, access: Access = "write", *, offset: int = 0, nbytes: int | None = None
    ) -> DeviceView:
        """Begin a use by the compute stream; it ends, and is noted, when the view goes.

        The view is of `nbytes` from `offset`, at least one; None: of all that follows.
        """

@final
class DeviceArena:
    """Device memory: one allocation of `budget` bytes, or a range that others have allocated.

    With `poison`, ranges are filled with 0xFF bytes when they are given back, in stream order.
    """

    def __init__(self, device: Device, budget: int, poison: bool = False) -> None: ...
    @staticmethod
    def over(
        device: Device, address: int, nbytes: int, owner: object, poison: bool = False
    ) -> DeviceArena:
        """Return an arena over memory of `device` that `owner` keeps, such as a tensor's.

        It is used after what the compute stream was given before. `owner` is let go once the arena
        and all leases are gone and the device has done all that was submitted.
        """

    def try_allocate(self, nbytes: int, label: str = "") -> DeviceLease | None:
        """Return a lease, or None when no free range is long enough."""

    def allocate(self, nbytes: int, label: str = "") -> DeviceLease:
        """Return a lease; raises BudgetError when no free range is long enough."""

    def try_allocate_at(self, offset: int, nbytes: int, label: str = "") -> DeviceLease | None:
        """Return a lease of a planned range, or None when a part of it is in use or outside."""

    @staticmethod
    def over_host(device: Device, memory: HostArena) -> DeviceArena:
        """Return an arena over all of `memory`, which is pinned for `device` and its memory too."""

    @property
    def address(self) -> int: ...
    @property
    def device(self) -> Device: ...
    def usage(self) -> dict[str, int]:
        """Return bytes: budget, in_use, peak, largest_free; and allocations so far."""

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

    def read_blocks(
        self,
        object: int,
        lease: Lease,
        nbytes: int,
        spans: Sequence[tuple[int, int]],
        demand: bool = False,
    ) -> Transfer:
        """Start to read bytes [begin, end) of the object, whole blocks, to their places in `lease`.

        Its other bytes stay as they are.
        """

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
class FileEngine:
    """Reads files of others in the background."""

    def __init__(self, engine: str = "auto", queue_depth: int = 16, threads: int = 4) -> None: ...
    @property
    def bytes_read(self) -> int: ...
    def close(self) -> None:
        """End reads in flight, cancel those not started; later ones raise OffloadError."""

@final
class ReadOnlyFile:
    """A regular file, open; links are followed."""

    def __init__(self, path: str) -> None: ...
    @property
    def version(self) -> tuple[int, int, int]:
        """What changes with the file: inode, bytes, time of the last change in ns."""

@final
class FileRanges:
    """Bytes that are read from files to where they belong in one buffer.

    `parts`: file, offset and bytes in it, offset in the buffer, name for messages. Every read after
    the first compares checksums, and raises CorruptionError for a file that was changed.
    """

    def __init__(
        self,
        engine: FileEngine,
        parts: Sequence[tuple[ReadOnlyFile, int, int, int, str]],
        block_bytes: int,
    ) -> None: ...
    def read(self, lease: Lease, demand: bool = False) -> Transfer:
        """Start to read all parts; what lies between them stays as it is. One at a time."""

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Bytes [begin, end) of the buffer that can be read by themselves, ascending."""

    def read_blocks(
        self, lease: Lease, spans: Sequence[tuple[int, int]], demand: bool = False
    ) -> Transfer:
        """Do the same as read() for the blocks that `spans`, ascending, consist of."""

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
class DeviceTransfer:
    """Bytes on their way between disk, host memory and a device; goes on without a handle."""

    def issued(self) -> bool:
        """Return whether a stream can be made to wait for its copy, or the transfer has ended."""

    def wait_stream(self, stream: Stream = "compute") -> None:
        """Make the stream wait for the copy; the host does not wait for it.

        After a fetch the stream may then use the device lease, after a spill it may change it.
        Blocks until the copy is issued, which counts as a stall. Raises the error that ended the
        transfer before.
        """

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Block until the end; raises the transfer's error."""

    def cancel(self) -> None:
        """Do not take the next step; ``wait`` then raises TransferCancelledError."""

@final
class DeviceTransfers:
    """Starts transfers, and keeps both leases of each for as long as it needs them.

    `via` is the host lease that the bytes go through, of an arena pinned for the device; without
    `store` and `object` they come from there, or stay there.
    """

    def __init__(self, device: Device) -> None: ...
    def fetch(
        self,
        dst: DeviceSpan,
        via: Lease,
        nbytes: int,
        *,
        store: SwapStore | None = None,
        object: int = 0,
        demand: bool = False,
    ) -> DeviceTransfer:
        """Start to read the object, and to copy it to the device as soon as it is in memory."""

    def spill(
        self,
        src: DeviceSpan,
        via: Lease,
        nbytes: int,
        *,
        after: Event | None = None,
        store: SwapStore | None = None,
        object: int = 0,
        demand: bool = False,
    ) -> DeviceTransfer:
        """Start to copy to the host, after the event, and to write the object after that.

        `src` may be dropped at once.
        """

    def stats(self) -> dict[str, float]:
        """Return `stalls`, the waits for a copy to be issued, and `stall_seconds`."""

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
        after: Sequence[Transfer | DeviceTransfer] = (),
    ) -> Transfer:
        """Queue the update of one unit; returns at once. It starts when `after` have ended.

        When one of them fails, the job ends with its error and changes nothing; others go on.

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

gather_chunk: int  # elements of a tensor for which device_gather needs one partial sum
gather_tensors: int  # the most that one device_gather takes

def has_device_update(
    device: Device, format: UpdateFormat, segments: Sequence[UpdateSegment]
) -> bool:
    """Return whether `device_update` can do it."""

def device_update(
    device: Device,
    format: UpdateFormat,
    segments: Sequence[UpdateSegment],
    param: int,
    grad: int,
    master: int,
    states: Sequence[int],
    scales: Sequence[int],
    label: str = "",
) -> None:
    """Submit one step of Adam or AdamW on a unit, in place, to the compute stream; all or nothing.

    Arrays are in the device's memory, given by the address of the unit's element 0; `master` is 0
    for fp32 parameters. States are fp32 or int8, bits those of `update`. Raises UnsupportedError
    for other rules and formats, and on a GPU for square roots that are not IEEE's.
    """

def device_gather(
    device: Device,
    tensors: Sequence[tuple[int, int, int]],
    *,
    from_type: ElementType,
    to_type: ElementType,
    scale: float = 1.0,
    add: bool = False,
    slab: int,
    partial: int,
    sum_squares: int,
    nonfinite: int,
    label: str = "",
) -> None:
    """Submit gathering gradients into a slab, scaled and cast, to the compute stream.

    `tensors`: address, elements, and offset in the slab in elements, of at most `gather_tensors`.
    `add` to what is there. Afterwards `sum_squares` (fp64, one for each) has the squares of what is
    in the slab, and `nonfinite` (uint32) is 1 if an element of it is not finite, else unchanged.
    `partial` is scratch: fp64, one for every `gather_chunk` elements begun of each tensor. All are
    addresses of device memory.
    """
