"""A checkpoint larger than the memory that loading it may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measured import run

save_file = pytest.importorskip("safetensors.torch").save_file

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_the_budget_and_about_a_unit(dtype: torch.dtype, tmp_path: Path) -> None:
    """400 MiB of fp32 parameters, from one file."""
    state = {f"{i}.weight": torch.full((2048, 2048), float(i), dtype=dtype) for i in range(25)}
    save_file(state, tmp_path / "model.safetensors")
    del state
    found = run(
        """
begin(256 * MIB)
with offload.deferred_init(sys.argv[1]):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(25)])
policy = offload.Policy(
    offload.Budget(host=96 * MIB), swap_dir=sys.argv[1], max_unit_bytes=16 * MIB,
    calibrate_disk=False,
)
offload.wrap(model, policy)
Path("/proc/self/clear_refs").write_text("5")
offload.load_weights(model, sys.argv[1])
loaded = status("VmHWM") - before
means = [p.mean().item() for p in model.parameters()]
report(loaded=loaded, right=means == [float(i) for i in range(25)])
""",
        tmp_path,
    )
    assert found["right"]
    assert found["loaded"] < 96 * MIB + 2 * 16 * MIB
