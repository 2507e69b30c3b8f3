"""Memory, disk and traffic of Policy(param_dtype=...): the plan's numbers are what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training as t
from measured import run
from mixed import policy_for
from torch import nn

import offload

MIB = 1 << 20
SIDE = 512


def make(frozen: int = 0, layers: int = 12) -> nn.Module:
    """Layers of 1 MiB in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)])
    for layer in model[:frozen]:
        layer.requires_grad_(False)
    return model


def test_the_plan_counts_16_bits_and_masters(tmp_path: Path) -> None:
    elements = 12 * SIDE * SIDE
    for frozen in (0, 5):
        model = offload.wrap(make(frozen), policy_for(make, tmp_path, 1 << 28))
        trained = elements * (12 - frozen) // 12
        assert offload.report(model).plan.host_bytes() == {
            "parameters": 2 * elements,
            "gradients": 2 * trained,
            "optimizer state": 4 * elements + 8 * trained,
            "staging": 0,
            "activations": 0,
        }
    model = offload.wrap(make(5), policy_for(lambda: make(5), tmp_path))
    plan = offload.report(model).plan
    host, disk = plan.host_bytes(), plan.disk_bytes()
    assert host["parameters"] + disk["parameters"] == 2 * elements
    assert host["optimizer state"] + disk["optimizer state"] == 4 * elements + 8 * trained
    assert all(not p.pin_state for p in plan.placements)


@pytest.mark.cpu_updates
def test_the_smallest_budget_is_that_of_half_the_bytes() -> None:
    least = {
        (dtype, frozen): t.least_budget(
            lambda f=frozen: make(f), param_dtype=dtype, max_unit_bytes="4MiB"
        )
        for dtype in (None, torch.bfloat16)
        for frozen in (0, 12)
    }
    staging = 12 * t.SMALL_BLOCKS["io_block_bytes"]
    assert least[torch.bfloat16, 0] - staging < least[None, 0] - staging
    # A frozen parameter of half the bytes, whose master passes through the ring before it comes.
    assert least[torch.bfloat16, 12] == least[None, 12] - MIB


@pytest.mark.parametrize("lazy", [True, False])
def test_the_bytes_of_a_step_are_foreseen(lazy: bool, tmp_path: Path) -> None:
    policy = policy_for(make, tmp_path, 8 * MIB, lazy_step=lazy)
    model = offload.wrap(make(3), policy)
    optimizer = offload.AdamW([p for p in model.parameters() if p.requires_grad])
    moved = []
    before = offload.report(model).as_dict()
    foreseen = offload.report(model).step_traffic()
    for _ in range(6):
        model(torch.randn(4, SIDE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = offload.report(model).as_dict()
        moved.append([now[k] - before[k] for k in ("disk_read_bytes", "disk_write_bytes")])
        before = now
    expected = offload.report(model).step_traffic()
    assert expected.written == foreseen.written
    assert expected.read == pytest.approx(foreseen.read, rel=0.1)
    steady = torch.tensor(moved[2:], dtype=torch.float64).mean(0)
    assert steady[0] == pytest.approx(expected.read, rel=0.3)
    assert steady[1] == pytest.approx(expected.written, rel=0.1)


def test_the_ring_holds_while_masters_are_read_and_written(tmp_path: Path) -> None:
    for frozen in (0, 6, 12):
        policy = policy_for(lambda f=frozen: make(f), tmp_path)
        model = offload.wrap(make(frozen), policy)
        state = model.state_dict()
        model.load_state_dict(state)
        with torch.no_grad():
            model[2].weight.add_(1.0)
        model(torch.randn(2, SIDE))
        offload.unwrap(model)
        assert torch.equal(model[0].weight, make()[0].weight)
        assert not torch.equal(model[2].weight, make()[2].weight)


def test_wrapping_and_training_take_the_budget_and_about_a_unit(tmp_path: Path) -> None:
    """400 MiB of fp32 parameters, 2.4 GiB of training state: all of it passes through 96 MiB."""
    found = run(
        """
begin(256 * MIB)
with offload.deferred_init(sys.argv[1]):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(25)])
model[7].requires_grad_(False)
first = model[0].weight[0].clone()
Path("/proc/self/clear_refs").write_text("5")
policy = offload.Policy(
    offload.Budget(host=96 * MIB), swap_dir=sys.argv[1], max_unit_bytes=16 * MIB,
    calibrate_disk=False, param_dtype=torch.bfloat16,
)
offload.wrap(model, policy)
wrapped = status("VmHWM") - before
assert torch.equal(model[0].state_dict()["weight"][0], first)
optimizer = offload.AdamW([p for p in model.parameters() if p.requires_grad])
for _ in range(2):
    model(torch.rand(2, 2048)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
model(torch.rand(2, 2048))
report(wrapped=wrapped)
""",
        tmp_path,
    )
    assert found["wrapped"] < 96 * MIB + 64 * MIB  # the window of what is deferred
    assert found["peak"] < 96 * MIB + 64 * MIB
