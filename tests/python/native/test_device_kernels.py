"""The device kernels through the bindings: on the simulated device, and where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from offload import OffloadError, UnorderedAccessError, UnsupportedError, _native

MIB = 1 << 20
N = 5000


class Memory:
    """Tensors in the memory of a device, by the views that they are made from."""

    def __init__(self, device: _native.Device) -> None:
        self.device = device
        self.arena = _native.DeviceArena(device, 2 * MIB)

    def put(self, values: torch.Tensor, label: str = "") -> torch.Tensor:
        view = self.arena.allocate(max(values.nbytes, 1), label).view()
        if self.device.computes_on_host:
            tensor = torch.frombuffer(view, dtype=torch.uint8)[: values.nbytes].view(values.dtype)  # type: ignore[arg-type]
        else:
            flat = torch.as_tensor(view, device="cuda")
            tensor = flat[: values.nbytes].view(values.dtype)
        return tensor.copy_(values.flatten())


def simulated() -> Memory:
    return Memory(_native.simulated_device(4 * MIB))


def cuda() -> Memory:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = _native.cuda_device(0)
    device.set_compute_stream(torch.cuda.current_stream().cuda_stream)
    return Memory(device)


WHERE = [simulated, pytest.param(cuda, marks=pytest.mark.gpu)]


def adamw(step: float = 3.0, **options: float) -> _native.UpdateHyper:
    return _native.UpdateHyper(
        "adamw",
        lr=1e-3,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        step=step,
        rounding=_native.AtenRounding(fma=True, sqrt="ieee"),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["float32", "int8"])
def test_update_has_the_bits_of_the_cpu(
    where: Callable[[], Memory], dtype: torch.dtype, state: str
) -> None:
    memory = where()
    torch.manual_seed(0)
    form = _native.UpdateFormat(str(dtype).removeprefix("torch."), state)
    cpu = {
        "param": torch.randn(N).to(dtype),
        "grad": torch.randn(N).to(dtype),
        "master": torch.randn(N if form.has_master else 0),
        "m": torch.zeros(N, dtype=torch.float32 if state == "float32" else torch.uint8),
        "v": torch.zeros(N, dtype=torch.float32 if state == "float32" else torch.uint8),
        "m_scale": torch.zeros(-(-N // 256) if state == "int8" else 0),
        "v_scale": torch.zeros(-(-N // 256) if state == "int8" else 0),
    }
    there = {name: memory.put(values) for name, values in cpu.items()}
    for step in range(1, 4):
        for arrays in (cpu, there):
            at = {name: values.data_ptr() for name, values in arrays.items()}
            args = (
                at["param"],
                at["grad"],
                at["master"] if form.has_master else 0,
                [at["m"], at["v"]],
                [at["m_scale"], at["v_scale"]] if state == "int8" else [],
            )
            hyper = adamw(float(step))
            if arrays is cpu:
                _native.update(hyper, form, [0.5], 0, 0, 0, *args, N, "scalar")
            else:
                segments = [
                    _native.UpdateSegment(begin, end, hyper, [0.5])
                    for begin, end in ((0, 256), (256, 256), (256, 768), (768, N))
                ]
                _native.device_update(memory.device, form, segments, *args)
    for name, values in cpu.items():
        assert torch.equal(there[name].cpu(), values), name


@pytest.mark.parametrize("where", WHERE)
def test_gather_scales_casts_and_sums(where: Callable[[], Memory]) -> None:
    memory = where()
    torch.manual_seed(0)
    grads = [torch.randn(n).bfloat16() for n in (1, 4096, 5001)]
    there = [memory.put(g) for g in grads]
    offsets = [0, 8, 8 + 4096]
    slab = memory.put(torch.zeros(10_000))
    chunks = sum(-(-g.numel() // _native.gather_chunk) for g in grads)
    partial = memory.put(torch.zeros(chunks, dtype=torch.float64))
    sums = memory.put(torch.zeros(3, dtype=torch.float64))
    flag = memory.put(torch.zeros(1, dtype=torch.int32))

    def gather(scale: float, add: bool) -> None:
        _native.device_gather(
            memory.device,
            [(g.data_ptr(), g.numel(), at) for g, at in zip(there, offsets, strict=True)],
            from_type="bfloat16",
            to_type="float32",
            scale=scale,
            add=add,
            slab=slab.data_ptr(),
            partial=partial.data_ptr(),
            sum_squares=sums.data_ptr(),
            nonfinite=flag.data_ptr(),
        )

    gather(0.5, add=False)
    gather(0.5, add=True)
    for grad, at, total in zip(grads, offsets, sums.cpu().tolist(), strict=True):
        assert torch.equal(slab[at : at + grad.numel()].cpu(), grad.float())
        assert total == pytest.approx(grad.double().square().sum().item(), rel=1e-12)
    assert not slab[1:8].any()
    assert flag.item() == 0
    there[2][-1] = float("inf")
    gather(1.0, add=False)
    assert flag.item() == 1


def test_refusals_and_the_checker() -> None:
    memory = simulated()
    param = memory.put(torch.ones(N), "weights")
    states = [memory.put(torch.zeros(N)) for _ in range(2)]
    grad = memory.put(torch.ones(N))
    address = [s.data_ptr() for s in states]
    form = _native.UpdateFormat()

    def update(hyper: _native.UpdateHyper, n: int, grads: int, moments: list[int]) -> None:
        segments = [_native.UpdateSegment(0, n, hyper, [])]
        _native.device_update(
            memory.device, form, segments, param.data_ptr(), grads, 0, moments, [], "layer.0"
        )

    amsgrad = adamw(amsgrad=True)
    assert _native.has_device_update(
        memory.device, form, [_native.UpdateSegment(0, N, adamw(), [])]
    )
    assert not _native.has_device_update(
        memory.device, form, [_native.UpdateSegment(0, N, amsgrad, [])]
    )
    with pytest.raises(UnsupportedError, match="without amsgrad"):
        update(amsgrad, N, grad.data_ptr(), address)
    with pytest.raises(OffloadError, match="needs 2 states"):
        update(adamw(), N, grad.data_ptr(), [])
    with pytest.raises(OffloadError, match="ends before it begins"):
        _native.device_update(
            memory.device, form, [_native.UpdateSegment(2, 1, adamw(), [])], param.data_ptr(),
            grad.data_ptr(), 0, address, [],
        )  # fmt: skip
    host = _native.HostArena(MIB, pin=memory.device)
    lease = memory.arena.allocate(512, "gradients")
    source = host.allocate(512)
    memory.device.copy_to_device(lease, source, 512)
    with pytest.raises(UnorderedAccessError, match=r"update of 'layer\.0'.*'gradients'"):
        update(adamw(), 128, lease.address, address)
    with pytest.raises(OffloadError, match="there is no element type 'int4'"):
        _native.device_gather(
            memory.device, [], from_type="int4", to_type="float32",  # type: ignore[arg-type]
            slab=0, partial=0, sum_squares=0, nonfinite=0,
        )  # fmt: skip
    too_many = [(0, 0, 0)] * (_native.gather_tensors + 1)
    with pytest.raises(OffloadError, match="one gather takes 64 tensors, not 65"):
        _native.device_gather(
            memory.device, too_many, from_type="float32", to_type="float32",
            slab=0, partial=0, sum_squares=0, nonfinite=0,
        )  # fmt: skip
    memory.device.drain()  # `source` must live until then
