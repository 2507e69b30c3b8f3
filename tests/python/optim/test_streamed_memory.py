"""A streamed step takes the host budget and no more: measured by the kernel, in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20
SLACK = 3 * MIB
"""What else a step takes: thread stacks, the rings, Python's own objects."""

SCRIPT = """
import gc
import json, sys
from pathlib import Path

import torch

import offload

folder, budget, state_format = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024


def make_optimizer(shapes, budget):
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    policy = offload.Policy(
        budget=offload.Budget(host=budget), swap_dir=folder, calibrate_disk=False
    )
    return offload.AdamW(parameters, policy=policy, state_format=state_format)


torch.set_num_threads(2)
warm = make_optimizer([(512, 512)] * 20, 16 << 20)  # what is loaded and started once
warm.step()
del warm
gc.collect()
optimizer = make_optimizer([(1024, 1024)] * 16, budget)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
for _ in range(3):
    optimizer.step()
print(json.dumps({"held": memory("VmHWM") - before}))
"""


@pytest.mark.parametrize("state_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [24 * MIB, 48 * MIB])
def test_the_peak_of_a_streamed_step_is_the_budget(
    tmp_path: Path, budget: int, state_format: str
) -> None:
    """The state, of 128 MiB in fp32, is more than the budget in either format."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(budget), state_format],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    held = json.loads(run.stdout)["held"]
    assert 0.9 * budget < held <= budget + SLACK
