"""ComputeDevice: what is asked of torch and of the core, and what is said where they cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import _native
from offload.runtime.buffers import MovedBuffers
from offload.tiers import compute_device
from offload.tiers.compute_device import CPU, ComputeDevice, device_title, torch_devices
from offload.tiers.grad_handle import GradHandle, GradState
from offload.tiers.unit import OffloadedParam

BUDGET = offload.Budget(host="1GiB", device="1MiB")


def policy(device: Any, **options: Any) -> offload.Policy:
    return offload.Policy(BUDGET, device=device, **options)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What this build, torch and the machine say of CUDA: two devices, the second is current."""
    says = SimpleNamespace(build=True, version="13.0", available=True)
    monkeypatch.setattr(compute_device, "_native", SimpleNamespace(has_cuda=True), raising=True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: says.available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return says


@pytest.mark.parametrize(
    ("device", "index"),
    [
        ("cuda", 1),
        ("cuda:0", 0),
        (torch.device("cuda"), 1),
        (torch.device("cuda", 0), 0),
    ],
)
def test_a_device_by_name(machine: SimpleNamespace, device: Any, index: int) -> None:
    assert torch_devices(policy(device)) == (torch.device("cuda", index),)


def test_the_simulated_device_is_the_cpu_to_torch() -> None:
    assert torch_devices(policy("simulated")) == (CPU,)
    assert torch_devices(offload.Policy(offload.Budget(host="1GiB"))) == (CPU,)


def test_a_device_that_is_not_there(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(offload.PolicyError, match="no such device; torch sees 2"):
        torch_devices(policy("cuda:2"))
    machine.available = False
    with pytest.raises(offload.PolicyError, match="torch finds no CUDA device"):
        torch_devices(policy("cuda"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(offload.PolicyError, match="is built without CUDA"):
        torch_devices(policy("cuda"))
    monkeypatch.setattr(compute_device, "_native", SimpleNamespace(has_cuda=False))
    with pytest.raises(offload.PolicyError, match="nvcc is on PATH"):
        torch_devices(policy("cuda"))


def test_several_devices_by_name(machine: SimpleNamespace) -> None:
    both = (torch.device("cuda", 1), torch.device("cuda", 0))
    assert torch_devices(policy(["cuda", "cuda:0"])) == both
    with pytest.raises(offload.PolicyError, match="cuda:1 is named twice, once as the current"):
        torch_devices(policy(["cuda:1", "cuda"]))
    with pytest.raises(offload.PolicyError, match=r"device='cuda:2'.*torch sees 2"):
        torch_devices(policy(["cuda:0", "cuda:2"]))
    assert torch_devices(policy(["simulated"] * 3)) == (CPU,) * 3
    assert device_title(policy(["cuda:1", "cuda:0"]), 1) == "cuda:0"
    assert device_title(policy(["simulated"] * 2), 1) == "simulated (1)"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "", 0])
def test_names_that_are_none(device: Any) -> None:
    with pytest.raises(offload.PolicyError, match="expected"):
        policy(device)


def test_wrap_refuses_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = nn.Linear(2, 2)
    weight = model.weight.data
    with pytest.raises(offload.PolicyError, match="CUDA"):
        offload.wrap(model, policy("cuda"))
    assert model.weight.data.data_ptr() == weight.data_ptr()


def test_both_arenas_are_one_allocation_that_goes_with_them() -> None:
    device = ComputeDevice.open(policy("simulated:latest"), CPU)
    assert device is not None
    home, ring = device.arenas(4096, 3 * 4096 + 100, poison=True)
    assert home is not None
    first, second = home.allocate(4096), ring.allocate(3 * 4096)
    assert second.address - first.address == 4096
    assert device.native.stats()["conflicts"] == 0
    tensor = device.tensor(second, 512, (3, 5), (1, 3), torch.float32)
    assert tensor.untyped_storage().data_ptr() == second.address + 512
    assert tensor.isnan().all()  # the poison
    assert tensor.stride() == (1, 3)
    tensor.fill_(2)
    assert tensor.sum() == 30
    empty = device.tensor(second, 0, (0, 5), (5, 1), torch.bfloat16)
    assert (empty.shape, empty.dtype) == ((0, 5), torch.bfloat16)
    assert device.arenas(0, 512, poison=False)[0] is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_of_any_type(dtype: torch.dtype) -> None:
    device = ComputeDevice.open(policy("simulated"), CPU)
    assert device is not None
    _, ring = device.arenas(0, 4096, poison=False)
    lease = ring.allocate(4096)
    ones = device.tensor(lease, 1024, (7, 3), (3, 1), dtype).fill_(1)
    again = device.tensor(lease, 1024, (21,), (1,), dtype)
    assert torch.equal(again, ones.flatten())


def test_memory_that_torch_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no")

    native = _native.simulated_device(4096)
    device = ComputeDevice(native, torch.device("cuda", 0))
    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    with pytest.raises(offload.BudgetError, match=r"of 1.0 GiB 1.0 MiB are free; lower Budget"):
        device.arenas(0, 4096, poison=False)


def test_the_compute_stream_is_torchs_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    native: Any = SimpleNamespace(set_compute_stream=taken.append)
    current = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    device = ComputeDevice(native, torch.device("cuda", 0))
    device.follow()
    current.cuda_stream = 77
    device.follow()
    assert taken == [0, 77]
    ComputeDevice(native, CPU).follow()
    assert taken == [0, 77]


def test_what_stands_for_a_parameter_and_its_gradient_is_on_its_device() -> None:
    """On "meta", where there is no CUDA."""
    device = torch.device("meta")
    param = OffloadedParam(nn.Parameter(torch.ones(3, 4)), "weight", device=device)
    assert param.placeholder.device == device
    assert param.given_device == CPU
    handle = GradHandle(GradState(param))
    assert (handle.device, handle.shape, handle.dtype) == (device, (3, 4), torch.float32)


def test_buffers_move_and_shared_ones_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    shared = torch.ones(3)
    for part in model[:2]:
        part.register_buffer("table", shared)
    model[0].register_buffer("nothing", None)
    moved = MovedBuffers(model, torch.device("meta"))
    assert all(buffer.is_meta for buffer in model.buffers())
    assert model[0].table is model[1].table
    new = torch.zeros(3)
    model[0].table = model[1].table = new
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(model[2], name, torch.ones(2))
    moved.back()
    assert model[0].table is model[1].table is new
    first = MovedBuffers(model, CPU, {model[0]: torch.device("meta")})
    assert model[0].table.is_meta
    assert model[0].table is model[1].table  # on the device of the first
    assert not model[2].running_mean.is_meta
    model[0].table = model[1].table = new
    first.back()
    unmoved = MovedBuffers(model, CPU)
    assert model[0].table is new
    unmoved.back()
    assert model[0].table is new
