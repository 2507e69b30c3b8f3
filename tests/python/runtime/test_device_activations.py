"""Training whose activations leave the device and come back: plain training's bits, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.runtime.activation_choice import ActivationChoice
from offload.runtime.wrapped import wrapped
from offload.tiers.activation_home import ActivationHome

pytestmark = [pytest.mark.own_device, pytest.mark.usefixtures("one_thread")]
MIB = 1 << 20
UNIT = 2 * 1054720
"""Parameters and gradients of a block of t.Stack."""
LOOP = t.Loop(steps=3, micro_batches=2)
MODES = ["host", "disk", "recompute", "auto"]


class Long(t.Stack):
    """Saves about 8 MiB in a forward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.repeat(1, 10))[:, : tokens.shape[1]]


def wrap(folder: Path, mode: str, device: Any = "simulated:latest") -> nn.Module:
    options = {"debug": True, **t.SMALL_BLOCKS}
    host = t.least_budget(Long, **options) + (66 if mode == "host" else 6) * MIB
    torch.manual_seed(0)
    policy = offload.Policy(
        offload.Budget(host=host, device=3 * UNIT),
        device=device,
        swap_dir=folder,
        activations=mode,
        activation_bytes=(64 if mode == "host" else 4) * MIB,
        **options,
    )
    return offload.wrap(Long(), policy)


def train(model: nn.Module) -> t.Outcome:
    return t.train(model, offload.AdamW(t.groups(model), lr=1e-2, weight_decay=0.1), LOOP)


def home_of(model: nn.Module) -> ActivationHome:
    home = wrapped(model).context.activations
    assert home is not None
    return home


@pytest.mark.parametrize("device", ["simulated", "simulated:earliest", "simulated:latest"])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_exact(mode: str, device: str, tmp_path: Path) -> None:
    expected = t.plain(Long, LOOP)
    model = wrap(tmp_path, mode, device)
    t.assert_same(expected, train(model))
    found, home = offload.report(model).as_dict(), home_of(model)
    (tier,) = wrapped(model).context.tiers
    assert tier.device.stats()["conflicts"] == 0
    assert found["activation_saved_bytes"] > 0
    assert found["to_host_bytes"] > found["activation_saved_bytes"]
    if mode == "disk":
        assert found["activation_write_bytes"] > 0
        assert found["activation_read_bytes"] > 0
    home.tidy()
    assert found["arena_peak_bytes"] <= found["arena_budget_bytes"]


@pytest.mark.parametrize(
    "reason", ["work on a tensor before a copy of it", "copy to the device before its use"]
)
@pytest.mark.parametrize("mode", ["host", "disk"])
def test_no_wait_may_be_missing(mode: str, reason: str, tmp_path: Path) -> None:
    model = wrap(tmp_path, mode)
    (tier,) = wrapped(model).context.tiers
    tier.device.omit_waits(reason)
    with pytest.raises(offload.UnorderedAccessError):
        train(model)


def test_several_devices(tmp_path: Path) -> None:
    expected = t.plain(Long, LOOP)
    model = wrap(tmp_path, "disk", ["simulated:latest"] * 2)
    t.assert_same(expected, train(model))
    assert all(tier.device.stats()["conflicts"] == 0 for tier in wrapped(model).context.tiers)


def test_the_choice_knows_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rates = ActivationChoice._rates

    def noted(self: ActivationChoice) -> Any:
        seen.append(rates(self))
        return seen[-1]

    monkeypatch.setattr(ActivationChoice, "_rates", noted)
    train(wrap(tmp_path, "auto", "simulated:earliest"))
    assert len(seen) == 1
    assert seen[0].to_host_bps > 0
    assert seen[0].to_device_bps > 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_cuda_device(mode: str, tmp_path: Path) -> None:
    """The bits of a model on the device whose activations autograd keeps."""
    kept = wrap(tmp_path, "recompute", "cuda:0")
    found = train(wrap(tmp_path, mode, "cuda:0"))
    t.assert_same(train(kept), found)
