"""How fast this machine updates on the CPU and on the device, and moves bytes between them.

Measured once, in ``wrap``, on samples in the arenas while these are still empty: the best of a few
rounds of each, a fraction of a second in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from offload import _native
from offload.planner import UpdateRates
from offload.tiers.cpu_share import cpu_share

_MOST_BYTES = 16 << 20
"""Of one array of a sample: beyond every cache, and a few milliseconds of work."""
_ROUNDS = 3
_ARRAYS = 4
"""Parameters, gradients and both moments, in fp32."""


def measure_update_rates(
    device: _native.Device, arena: _native.DeviceArena, host: _native.HostArena
) -> UpdateRates:
    """Measure on `device`, whose arenas `arena` and `host`, pinned for it, are empty."""
    room = min(arena.usage()["budget"] // _ARRAYS, host.usage()["budget"], _MOST_BYTES)
    nbytes = room // 4096 * 4096
    leases = [arena.allocate(nbytes, "sample") for _ in range(_ARRAYS)]
    for lease in leases:
        device.fill(lease, 0)
    via = host.allocate(nbytes)
    torch.frombuffer(via, dtype=torch.uint8, count=nbytes).zero_()
    to_device, to_host = _link_rates(device, leases[0], via, nbytes)
    segments = [_segment(nbytes // 4)]
    param, grad, *states = (lease.address for lease in leases)

    def kernel() -> None:
        _native.device_update(
            device, _native.UpdateFormat(), segments, param, grad, 0, states, [], "sample"
        )
        device.drain()

    computed = _seconds(kernel)
    return UpdateRates(
        cpu=_ARRAYS * nbytes / _cpu_seconds(nbytes // 4, segments),
        kernel=_ARRAYS * nbytes / computed,
        to_device=to_device,
        to_host=to_host,
    )


def measure_link(
    device: _native.Device, arena: _native.DeviceArena, host: _native.HostArena
) -> tuple[float, float]:
    """Return bytes per second to `device` and from it; its `arena` and `host` are empty."""
    nbytes = min(arena.usage()["budget"], host.usage()["budget"], _MOST_BYTES) // 4096 * 4096
    lease, via = arena.allocate(nbytes, "sample"), host.allocate(nbytes)
    device.fill(lease, 0)
    torch.frombuffer(via, dtype=torch.uint8, count=nbytes).zero_()
    return _link_rates(device, lease, via, nbytes)


def _link_rates(
    device: _native.Device, lease: _native.DeviceLease, via: _native.Lease, nbytes: int
) -> tuple[float, float]:
    transfers = _native.DeviceTransfers(device)
    filled = device.record("compute")
    device.wait("h2d", filled, "start of a measurement")

    def to_device() -> None:
        transfers.fetch(lease, via, nbytes).wait()

    def to_host() -> None:
        transfers.spill(lease, via, nbytes, after=device.record("h2d")).wait()

    rates = nbytes / _seconds(to_device), nbytes / _seconds(to_host)
    device.drain()
    return rates


def _cpu_seconds(numel: int, segments: list[_native.UpdateSegment]) -> float:
    pipeline = _native.UpdatePipeline(None, None, 0, cpu_share())
    arrays = [torch.zeros(numel) for _ in range(_ARRAYS)]
    operands = [_native.UpdateOperand.borrowed(a.data_ptr(), a.nbytes, a) for a in arrays]
    param, grad, *states = operands

    def update() -> None:
        pipeline.submit(
            numel, _native.UpdateFormat(), 0, param, grad, None, states, [], segments
        ).wait()

    seconds = _seconds(update)
    pipeline.close()
    return seconds


def _segment(numel: int) -> _native.UpdateSegment:
    hyper = _native.UpdateHyper(
        "adamw", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
        rounding=_native.AtenRounding(fma=True, sqrt="ieee"),
    )  # fmt: skip
    return _native.UpdateSegment(0, numel, hyper, [])


def _seconds(work: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best
