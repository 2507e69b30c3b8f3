"""What the user asks for: budgets, places and switches. Frozen data, checked when made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Literal, NoReturn

from offload.errors import PolicyError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
Pace = Literal["timed", "earliest", "latest"]
_SIMULATED: dict[str, Pace] = {
    "simulated": "timed",
    "simulated:latest": "latest",
    "simulated:earliest": "earliest",
    "simulated:unified": "latest",
}
ACTIVATIONS = ("keep", "host", "disk", "recompute", "auto")
"""What ``Policy.activations`` may be."""
UPDATES = ("cpu", "device", "auto")
"""What ``Policy.update`` may be."""
PARAM_DTYPES = ("torch.bfloat16", "torch.float16")
"""What ``Policy.param_dtype`` may be, as torch prints it: this module does not see torch."""
_CUDA = re.compile(r"cuda(:[0-9]+)?")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Return a number of bytes from an int or a string such as "20GiB", "512 MB" or "4096".

    Raises:
        PolicyError: when `size` is neither, is negative or has an unknown unit.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise PolicyError(f'{what}: expected bytes or a string such as "20GiB", got {size!r}')
    if isinstance(size, int):
        if size < 0:
            raise PolicyError(f"{what}: {size} bytes is negative")
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match.group(2).upper() not in _UNITS:
        known = "B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"
        raise PolicyError(f"{what}: cannot read {size!r} as bytes; units are {known}")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def format_bytes(nbytes: float) -> str:
    """Return bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


@dataclass(frozen=True)
class Budget:
    """Hard limits on what the runtime holds in each tier.

    Attributes:
        host: bytes of RAM for parameters, gradients, optimizer state, staging and the activations
            that the runtime holds, as an int or a string such as "20GiB". Activations that autograd
            keeps are not part of it.
        disk: bytes of the swap directory; None: what the filesystem has.
        device: bytes of the device's memory for parameters and gradients in use, and for optimizer
            state where updates run there; of each device's, where there are several. Refused while
            ``Policy.device`` is "cpu", where the device is the host. Not used, and may be left out,
            where the device's memory is the host's.
    """

    host: int | str
    disk: int | str | None = None
    device: int | str | None = None

    def __post_init__(self) -> None:
        if self.host_bytes == 0:
            raise PolicyError("Budget(host=...): 0 bytes cannot hold anything")
        if self.disk is not None:
            parse_bytes(self.disk, "Budget(disk=...)")
        if self.device is not None:
            parse_bytes(self.device, "Budget(device=...)")

    @property
    def host_bytes(self) -> int:
        """The host budget in bytes."""
        return parse_bytes(self.host, "Budget(host=...)")

    @property
    def device_bytes(self) -> int:
        """The device budget in bytes, 0 when none was given."""
        return 0 if self.device is None else parse_bytes(self.device, "Budget(device=...)")

    @property
    def disk_bytes(self) -> int | None:
        """The disk budget in bytes, None when unlimited."""
        return None if self.disk is None else parse_bytes(self.disk, "Budget(disk=...)")


@dataclass(frozen=True)
class Policy:
    """How a model is offloaded.

    Attributes:
        budget: the hard limits.
        device: where the compute runs: "cpu", "cuda", "cuda:1" or such a ``torch.device``.
            Parameters and gradients are copied to ``Budget(device=...)`` bytes of a CUDA device
            while they are in use, and are tensors there; ``wrap`` moves buffers there for good.
            Inputs are the user's to move; of updates see ``update``. "simulated" is a device
            without one, for tests of offload: memory apart from the host's, copies that are done
            late, and a check that nothing is used without waiting for it; "simulated:latest" ends
            copies as late as CUDA may, "simulated:earliest" at once; "simulated:unified" has the
            host's memory. Where a GPU has it too (integrated, with registered host memory at the
            same addresses), nothing is copied: tensors lie on the memory of ``Budget(host=...)``,
            and updates run on the CPU. A list, as ``["cuda:0", "cuda:1"]``, shares the model out:
            each device gets a run of blocks that follow each other, about as many bytes as the
            others, and each has all of ``Budget(device=...)`` for them. What a block's forward is
            given is moved to its device; what the model's returns, to that of its first input.
        swap_dir: directory on the disk to spill to; it must exist. Several directories, on disks of
            their own, are striped in proportion to their rates. None: nothing may be spilled, and
            a model that does not fit into the host budget is refused.
        units: names of modules (as in ``model.named_modules()``) whose parameters are fetched and
            released together. None: found automatically; each expert of a mixture that keeps its
            experts in a ``ModuleList`` or ``ModuleDict`` is one, and so is a module whose
            parameters have a row for each expert, of which only those that are used are read.
        max_unit_bytes: a block found automatically is split into its child modules while it is
            larger than this. None: 1/24 of the host budget, and at most 1/6 of the device's (1/16
            where updates may run there), so that several units fit at once.
        io_engine: "auto" (io_uring where the kernel offers it, threads elsewhere), "io_uring" or
            "threads".
        queue_depth: I/O requests in flight at the most, in each swap directory.
        io_block_bytes: bytes of one I/O request, a power of two from 64 KiB to 16 MiB.
        calibrate_disk: measure the rates of each swap directory's disk, for about two seconds, the
            first time it is used (the result is kept in ``~/.cache/offload``). False: directories
            share evenly, and reads and writes are always mixed.
        encrypt_swap: encrypt what is written to disk (AES-256-XTS), with a key that is only in
            memory.
        param_dtype: ``torch.bfloat16`` or ``torch.float16``: fp32 parameters are kept, fetched and
            computed with in this dtype, and so are their gradients, while optimizers of
            ``offload.optim`` update fp32 master weights (`docs/models.md`). ``state_dict()`` and
            ``unwrap()`` give the fp32 values. None: parameters stay as they are.
        lazy_step: let ``offload.AdamW.step()`` return at once, the update of each unit being done
            in the background before that unit is next used. False: ``step()`` returns when all
            is updated. The results are the same bits.
        update: where optimizer updates run: "cpu", or "device", to which parameters, gradients and
            states are then brought: those of ``offload.Adam`` and ``AdamW`` without amsgrad, with
            states in fp32 or int8; others stay on the CPU, and ``report`` says so. The results are
            the same bits. A unit needs room on the device for all of its state. "auto": as many
            units on either side as make both end soonest, by rates measured in ``wrap``; on the
            CPU where there is no device, or no room.
        activations: what becomes of the tensors that autograd saves between the forward and the
            backward (`docs/activations.md`). "keep": autograd keeps them, outside of every
            budget. "host": they are moved to ``activation_bytes`` of the host budget, and what does
            not fit goes on to disk, or is refused without a swap directory; on the CPU, where the
            device's memory is the host's, that counts and bounds them and saves no memory; those of
            a CUDA device come to page-locked memory and go back ahead of the backward. "disk":
            they are written to disk as they come, but for what ``activation_bytes`` will still
            hold when the backward begins, and are read back ahead of it. "recompute": each block
            keeps only its inputs, treated as with "disk", and runs again in the backward. "auto":
            as "disk", and of the blocks as many are recomputed as make a step fastest, by what
            the first steps took and the measured rates of the disk and of the link to the device;
            what fits nowhere is left to autograd.
        activation_bytes: the part of the host budget for activations. None: half of it with
            "host", a quarter otherwise, or less where the model needs the rest.
        debug: overwrite with NaN whatever memory is given up, so that a use after release shows;
            compare the CRC32C of what nobody should have changed in memory, or on a device, before
            it is given up, and of what a device was sent and has sent; on a CUDA device, check that
            every two uses of the same bytes are ordered. A pass over the bytes at each release, and
            one at each read and write; of copies on a device a copy to the host at either end of
            their stay, which waits for what was computed. The values are the same.
    """

    budget: Budget
    device: object = "cpu"
    swap_dir: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None
    units: Sequence[str] | None = None
    max_unit_bytes: int | str | None = None
    io_engine: str = "auto"
    queue_depth: int = 16
    io_block_bytes: int | str = 2**20
    calibrate_disk: bool = True
    encrypt_swap: bool = False
    param_dtype: object | None = None
    lazy_step: bool = True
    update: str = "cpu"
    activations: str = "keep"
    activation_bytes: int | str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise PolicyError(f"Policy(budget=...): expected a Budget, got {self.budget!r}")
        self._check_devices()
        if self.update not in UPDATES:
            raise PolicyError(
                f"Policy(update={self.update!r}): expected one of {', '.join(UPDATES)}"
            )
        if self.update == "device" and self.is_cpu:
            raise PolicyError(
                'Policy(update="device") needs a device, and Policy(device="cpu") has none: give '
                'update="cpu" or "auto"'
            )
        if self.io_engine not in ("auto", "io_uring", "threads"):
            raise PolicyError(
                f"Policy(io_engine={self.io_engine!r}): expected auto, io_uring or threads"
            )
        if not 1 <= self.queue_depth <= 1024:
            raise PolicyError(f"Policy(queue_depth={self.queue_depth}): expected 1 to 1024")
        block = parse_bytes(self.io_block_bytes, "Policy(io_block_bytes=...)")
        if block.bit_count() != 1 or not 2**16 <= block <= 2**24:
            raise PolicyError(
                f"Policy(io_block_bytes={self.io_block_bytes!r}): expected a power of two from "
                "64 KiB to 16 MiB"
            )
        if len(set(self.swap_dirs)) != len(self.swap_dirs):
            raise PolicyError(f"Policy(swap_dir={self.swap_dir!r}): a directory is named twice")
        if self.swap_dir is not None and not self.swap_dirs:
            raise PolicyError("Policy(swap_dir=[]): name a directory, or None")
        if isinstance(self.units, str):
            raise PolicyError(f"Policy(units={self.units!r}): expected a list of module names")
        if self.max_unit_bytes is not None:
            parse_bytes(self.max_unit_bytes, "Policy(max_unit_bytes=...)")
        dtype = self.param_dtype
        if dtype is not None and (isinstance(dtype, str) or str(dtype) not in PARAM_DTYPES):
            raise PolicyError(
                f"Policy(param_dtype={dtype!r}): expected torch.bfloat16, torch.float16 "
                "or None; fp32 parameters can be kept in no other dtype"
            )
        self._check_activations()

    def _check_devices(self) -> None:
        names = self.device_names
        if not names:
            raise PolicyError("Policy(device=[]): name a device")
        what = f"Policy(device={(names[0] if len(names) == 1 else list(names))!r})"
        for name in names:
            if name not in ("cpu", *_SIMULATED) and _CUDA.fullmatch(name) is None:
                raise PolicyError(
                    f'{what}: expected "cpu", "cuda" or "cuda:N"; other devices are not supported'
                )
        if len(names) > 1 and not (self.is_cuda or all(name in _SIMULATED for name in names)):
            raise PolicyError(
                f"{what}: several devices must all be CUDA devices, or all simulated ones"
            )
        twice = [name for name in names if names.count(name) > 1]
        if self.is_cuda and twice:
            raise PolicyError(f"{what}: {twice[0]!r} is named twice")
        if len(names) > 1 and "simulated:unified" in names:
            raise PolicyError(f"{what}: a device with the host's memory can only be the only one")
        may_be_unified = self.is_unified or (self.is_cuda and len(names) == 1)  # wrap asks
        if not (self.is_cpu or may_be_unified) and self.budget.device is None:
            self.refuse_without_device_budget()
        if self.is_cpu and self.budget.device is not None:
            raise PolicyError(
                'Budget(device=...) has no meaning with Policy(device="cpu"): device and host are '
                "the same memory; give Budget(host=...) alone"
            )

    def _check_activations(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise PolicyError(
                f"Policy(activations={self.activations!r}): expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.activations == "disk" and not self.swap_dirs:
            raise PolicyError(
                'Policy(activations="disk") needs a directory on the disk to spill to: give '
                "Policy(swap_dir=...)"
            )
        if self.activation_bytes is None:
            return
        if self.activations == "keep":
            raise PolicyError(
                'Policy(activation_bytes=...) has no meaning with activations="keep": autograd '
                "keeps them, and nothing bounds them"
            )
        nbytes = parse_bytes(self.activation_bytes, "Policy(activation_bytes=...)")
        if not 0 < nbytes < self.budget.host_bytes:
            raise PolicyError(
                f"Policy(activation_bytes={self.activation_bytes!r}): expected more than 0 and "
                f"less than the host budget it is a part of, {self.budget.host_bytes} bytes"
            )

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices as strings, as torch prints them; one, unless ``device`` is a list."""
        if isinstance(self.device, list | tuple):
            return tuple(str(device) for device in self.device)
        return (str(self.device),)

    @property
    def is_cpu(self) -> bool:
        """Whether the compute is in host memory."""
        return self.device_names == ("cpu",)

    def refuse_without_device_budget(self) -> NoReturn:
        """Raise PolicyError: the device has memory apart from the host's."""
        raise PolicyError(
            f"Policy(device={self.device!r}) needs Budget(device=...): the bytes of its memory "
            "that offload may use"
        )

    @property
    def is_unified(self) -> bool:
        """Whether the compute is on a simulated device with the host's memory."""
        return self.device_names == ("simulated:unified",)

    @property
    def is_cuda(self) -> bool:
        """Whether the compute is on CUDA devices."""
        return all(_CUDA.fullmatch(name) is not None for name in self.device_names)

    @property
    def paces(self) -> tuple[Pace, ...]:
        """When each simulated device ends its copies; none: there are no such devices."""
        return tuple(_SIMULATED[name] for name in self.device_names if name in _SIMULATED)

    @property
    def moves_activations(self) -> bool:
        """Whether anything is done about activations."""
        return self.activations != "keep"

    @property
    def swap_dirs(self) -> tuple[str, ...]:
        """The swap directories as strings; none when nothing may be spilled."""
        if self.swap_dir is None:
            return ()
        if isinstance(self.swap_dir, str | PathLike):
            return (fspath(self.swap_dir),)
        return tuple(fspath(folder) for folder in self.swap_dir)

    @property
    def block_bytes(self) -> int:
        """``io_block_bytes`` as a number."""
        return parse_bytes(self.io_block_bytes, "Policy(io_block_bytes=...)")

    @property
    def unit_limit(self) -> int:
        """Bytes above which an automatically found unit is split."""
        if self.max_unit_bytes is not None:
            return parse_bytes(self.max_unit_bytes, "Policy(max_unit_bytes=...)")
        if not self.budget.device_bytes:
            return self.budget.host_bytes // 24
        share = 6 if self.update == "cpu" else 16
        return min(self.budget.host_bytes // 24, self.budget.device_bytes // share)
