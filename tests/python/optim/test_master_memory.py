"""fp32 copies of 16-bit parameters are made without another one on the way, in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20
SLACK = 8 * MIB

SCRIPT = """
import sys
from pathlib import Path

import torch

import offload

place, folder = sys.argv[1:]


def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024


def make_optimizer(side):
    param = torch.nn.Parameter(torch.ones(side, 4096, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    budget = offload.Budget(host=24 << 20)
    policy = offload.Policy(budget=budget, swap_dir=folder, calibrate_disk=False)
    return offload.optim.SGD([param], lr=0.5, policy=None if place == "memory" else policy)


torch.set_num_threads(2)
make_optimizer(2048).step()  # what is loaded and started once
optimizer = make_optimizer(8192)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
optimizer.step()
print(memory("VmHWM") - before)
assert (optimizer.param_groups[0]["params"][0] == 0.5).all()
assert (optimizer.state_dict()["state"][0]["master"] == 0.5).all()
"""


@pytest.mark.parametrize(("place", "most"), [("memory", 128 * MIB), ("disk", 24 * MIB)])
def test_the_peak_of_the_first_step(place: str, most: int, tmp_path: Path) -> None:
    """The parameter has 64 MiB, its copy 128 MiB, which is the state, or passes through."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, place, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= most + SLACK
