"""Finding out how this process's torch rounds, so that the native update gives the same bits.

On the CPU two things differ between machines: whether ATen's kernels fuse multiply and add, and the
square root, which torch takes from MKL where it was built with it and which MKL does not round
correctly. Neither can be asked for; both show in one optimizer step on a sample.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from offload import _native

_SAMPLE = 1 << 16


@cache
def aten_rounding() -> _native.AtenRounding:
    """Return the rounding with which the native rules match ``torch.optim`` bit for bit.

    Warns (once) when none of the known ones does; results are then right to the last digit or two,
    but not the same bits as torch's.
    """
    # MKL chooses its kernel at the first call, and gets it wrong in a parallel one
    # (pytorch issue 188792).
    torch.ones(1).sqrt()
    inputs = _sample()
    expected = _torch_step(inputs)
    isa = _native.best_isa()
    for fma in (True, False):
        for rule in _native.sqrt_rules(isa):
            rounding = _native.AtenRounding(fma, rule)
            if _native_step(inputs, rounding, isa) == expected:
                return rounding
    warnings.warn(
        "offload.optim: this torch build rounds in a way that is not known here "
        f"(capability {torch.backends.cpu.get_cpu_capability()}); updates will differ from "
        "torch.optim in the last bits",
        stacklevel=2,
    )
    return _native.AtenRounding(True, "ieee")


def _sample() -> list[torch.Tensor]:
    """Parameter, gradient and moments: exp_avg_sq over the whole range of fp32."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(_SAMPLE, generator=generator)
    grad[::2] = 0  # half of the sample keeps the smallest exp_avg_sq
    exp_avg = torch.randn(_SAMPLE, generator=generator)
    bits = torch.randint(0, 0x7F800000, (_SAMPLE,), generator=generator, dtype=torch.int32)
    return [torch.zeros(_SAMPLE), grad, exp_avg, bits.view(torch.float32)]


def _torch_step(inputs: list[torch.Tensor]) -> list[bytes]:
    start, grad, exp_avg, exp_avg_sq = (t.clone() for t in inputs)
    param = torch.nn.Parameter(start)
    param.grad = grad
    optimizer = torch.optim.AdamW([param], lr=1.0, eps=0.0, weight_decay=0.0, foreach=False)
    optimizer.state[param] = {
        "step": torch.tensor(99.0),
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }
    optimizer.step()
    return [_bits(t) for t in (param.detach(), exp_avg, exp_avg_sq)]


def _native_step(
    inputs: list[torch.Tensor], rounding: _native.AtenRounding, isa: str
) -> list[bytes]:
    param, grad, exp_avg, exp_avg_sq = (t.clone() for t in inputs)
    hyper = _native.UpdateHyper(
        "adamw", lr=1.0, beta1=0.9, beta2=0.999, step=100.0, rounding=rounding
    )
    _native.update(
        hyper,
        _native.UpdateFormat(),
        factors=[],
        seed=0,
        parameter=0,
        first=0,
        param=param.data_ptr(),
        grad=grad.data_ptr(),
        master=0,
        states=[exp_avg.data_ptr(), exp_avg_sq.data_ptr()],
        scales=[],
        n=_SAMPLE,
        isa=isa,
    )
    return [_bits(t) for t in (param, exp_avg, exp_avg_sq)]


def _bits(tensor: torch.Tensor) -> bytes:
    """The bits of an fp32 tensor, all NaNs alike."""
    return torch.where(tensor.isnan(), torch.nan, tensor).numpy().tobytes()
