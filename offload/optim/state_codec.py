"""States in the format in which they are kept, and in fp32, as state_dicts have them.

Decoding is exact. What was decoded from bfloat16 is encoded to the same bits again; from int8 it
may not be, since the largest element of a block, which gives the scale, is not always a value of
the code. So a state_dict has the codes and scales beside the decoded state (CODES, SCALE), and they
are taken where the state still is what they stand for.
"""

from __future__ import annotations

import torch

from offload import _native
from offload.optim.rule import Rule
from offload.tiers.state_layout import QUANT_BLOCK

CODES = ".codes"
SCALE = ".scale"
"""What is added to a state's name for the codes and the scales of int8."""


def encode(rule: Rule, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return state `name` in the rule's format, and its scales where it has some.

    Args:
        rule: whose state it is.
        name: of the state.
        values: fp32, flat.
    """
    if rule.state_format != "int8":
        return values.to(getattr(torch, rule.state_format)), None
    numel = values.numel()
    codes = torch.empty(numel, dtype=torch.uint8)
    scales = torch.empty(-(-numel // QUANT_BLOCK))
    values = values.contiguous()
    hyper, layout = rule.everything(), _native.UpdateFormat(state="int8")
    number = rule.NAMES.index(name)
    _native.encode_state(
        hyper, layout, number, values.data_ptr(), codes.data_ptr(), scales.data_ptr(), numel
    )
    return codes, scales


def decode(rule: Rule, name: str, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Return state `name` in fp32, flat; an alias where it is kept so.

    Args:
        rule: whose state it is.
        name: of the state.
        codes: as encode() returns them, flat.
        scales: likewise.
    """
    if scales is None:
        return codes.float()
    values = torch.empty(codes.numel())
    hyper, layout = rule.everything(), _native.UpdateFormat(state="int8")
    number = rule.NAMES.index(name)
    codes, scales = codes.contiguous(), scales.contiguous()
    _native.decode_state(
        hyper,
        layout,
        number,
        codes.data_ptr(),
        scales.data_ptr(),
        values.data_ptr(),
        codes.numel(),
    )
    return values
