"""ComputeDevice: where a wrapped model computes, as torch and as the native core know it.

Who orders what on CUDA:
 1. torch submits work to its current stream of the device, which is the core's compute stream.
    Whoever is about to use a copy calls follow() first: if the user has changed streams since, the
    new one is made to wait for all that the former one was given.
 2. device memory is one tensor, so that torch's accounts show it and its allocator knows of it.
    The core divides it up, in the order of the compute stream.
 3. tensors on a lease keep its use, and with it the lease, for as long as any of them lives. It
    ends on the stream that was current when it began, also when another one is by then.
The simulated device is the same with the host's memory, and torch's device is the CPU.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from offload import _native
from offload.errors import BudgetError, OffloadError, PolicyError
from offload.policy import Policy, format_bytes

CPU = torch.device("cpu")


def torch_devices(policy: Policy) -> tuple[torch.device, ...]:
    """Return where the tensors of a model wrapped with `policy` are while they are in use.

    One for each of ``Policy.device``, in its order. Where several are simulated, all are the CPU.

    Raises:
        PolicyError: it names a CUDA device that this build, this torch or this machine has not, or
            one of them twice.
    """
    if not policy.is_cuda:
        return (CPU,) * len(policy.device_names)
    devices = tuple(_cuda_device(name) for name in policy.device_names)
    twice = [str(device) for device in devices if devices.count(device) > 1]
    if twice:
        raise PolicyError(
            f"Policy(device={list(policy.device_names)!r}): {twice[0]} is named twice, once as the "
            "current one"
        )
    return devices


def _cuda_device(name: str) -> torch.device:
    what = f"Policy(device={name!r})"
    if not _native.has_cuda:
        raise PolicyError(
            f"{what}: this build of offload has no CUDA; build it again where the CUDA toolkit is "
            "installed and nvcc is on PATH ('make build', or 'pip install --no-build-isolation .')"
        )
    if getattr(torch.version, "cuda", None) is None:
        raise PolicyError(
            f"{what}: torch {torch.__version__} is built without CUDA; install one with it"
        )
    if not torch.cuda.is_available():
        raise PolicyError(f"{what}: torch finds no CUDA device that it can use; see nvidia-smi")
    number = name.partition(":")[2]
    index = int(number) if number else torch.cuda.current_device()
    count = torch.cuda.device_count()
    if index >= count:
        raise PolicyError(f"{what}: there is no such device; torch sees {count}, from cuda:0")
    return torch.device("cuda", index)


def device_title(policy: Policy, number: int) -> str:
    """Return what to call device `number` of `policy`: several simulated ones are counted."""
    name = policy.device_names[number]
    return f"{name} ({number})" if len(policy.paces) > 1 else name


def shares_memory(policy: Policy, devices: Sequence[torch.device]) -> bool:
    """Whether the device of `policy`, which is torch's in `devices`, has the host's memory.

    Raises:
        PolicyError: it has not, and there is no budget for it; or one of several has.
        UnsupportedError, DeviceError: the driver refuses to tell.
    """
    unified = policy.is_unified
    if policy.is_cuda:
        unified = any(_native.cuda_host_access(device.index)["unified"] for device in devices)
    if unified and len(devices) > 1:
        raise PolicyError(
            f"Policy(device={policy.device!r}): a device with the host's memory can only be the "
            "only one"
        )
    if not unified and not policy.is_cpu and policy.budget.device is None:
        policy.refuse_without_device_budget()
    return unified


class ComputeDevice:
    """A device with memory apart from the host's.

    Attributes:
        native: the core's.
        torch: torch's.
        name: for people.
    """

    def __init__(self, native: _native.Device, device: torch.device, name: str = "") -> None:
        """Put together what is the same device; open() does so from a policy."""
        self.native = native
        self.torch = device
        self.name = name or str(device)

    @classmethod
    def open(cls, policy: Policy, device: torch.device, number: int = 0) -> ComputeDevice | None:
        """Return device `number` of `policy`, which is torch's `device`; None: the CPU itself.

        On CUDA, order is checked with ``Policy.debug`` alone: it costs time.

        Raises:
            UnsupportedError, DeviceError: the driver refuses.
        """
        name = device_title(policy, number)
        if policy.paces:
            native = _native.simulated_device(
                policy.budget.device_bytes or 1,
                pace=policy.paces[number],
                unified=policy.is_unified,
            )
        elif policy.is_cuda:
            native = _native.cuda_device(device.index, check=policy.debug)
        else:
            return None
        return cls(native, device, name)

    def arenas(
        self, home_bytes: int, ring_bytes: int, poison: bool
    ) -> tuple[_native.DeviceArena | None, _native.DeviceArena]:
        """Return an arena of each size, in one allocation; None instead of an empty first one.

        Args:
            home_bytes: a multiple of 512.
            ring_bytes: more than 0; rounded down to a multiple of 512.
            poison: see DeviceArena.

        Raises:
            BudgetError: torch cannot have as much of the device's memory.
        """
        memory = self._allocate(home_bytes + ring_bytes)
        self.follow()  # torch may have given memory that its current stream still uses
        address = memory.data_ptr()
        over = _native.DeviceArena.over
        home = over(self.native, address, home_bytes, memory, poison) if home_bytes else None
        return home, over(self.native, address + home_bytes, ring_bytes, memory, poison)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if self.torch.type == "cpu":
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            return torch.frombuffer(mmap.mmap(-1, nbytes, flags=private), dtype=torch.uint8)
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.torch)
            raise BudgetError(
                f"{format_bytes(nbytes)} of {self.native.name} cannot be had: of "
                f"{format_bytes(total)} {format_bytes(free)} are free; lower Budget(device=...), "
                "and leave room for activations"
            ) from error

    def follow(self) -> None:
        """Take torch's current stream for the compute stream."""
        if self.torch.type != "cpu":
            self.native.set_compute_stream(torch.cuda.current_stream(self.torch).cuda_stream)

    def tensor(
        self,
        lease: _native.DeviceLease,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        access: _native.Access = "write",
    ) -> torch.Tensor:
        """Return a tensor over `lease`, with a storage of its own: a use by the compute stream.

        Args:
            lease: of this device.
            offset: as for ``Slab.view``, and so are the next ones.
            shape: of it.
            stride: of it.
            dtype: of it.
            access: "read": the tensor will not be written to.
        """
        numel = 1
        for size in shape:
            numel *= size
        if numel == 0:
            return torch.empty_strided(shape, stride, dtype=dtype, device=self.torch)
        self.follow()
        view = lease.view(access, offset=offset, nbytes=numel * dtype.itemsize)
        if self.torch.type == "cpu":
            return torch.frombuffer(view, dtype=dtype).as_strided(shape, stride)
        flat = torch.as_tensor(view, device=self.torch)
        if flat.data_ptr() != lease.address + offset:  # a copy would be changed in vain
            raise OffloadError("torch has copied memory of the device (internal error)")
        return flat.view(dtype).as_strided(shape, stride)
