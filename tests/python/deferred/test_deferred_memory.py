"""A model many times larger than the memory that its making and its wrapping take."""

from __future__ import annotations

from pathlib import Path

from measured import run

MIB = 1 << 20

MODEL = """
def make():  # 400 MiB of fp32 parameters in 25 layers of 16 MiB
    layers = [nn.Linear(2048, 2048, bias=False) for _ in range(25)]
    for layer in layers:  # as transformers does: again, when all are made
        nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers)
"""


def test_building_takes_a_window_of_memory_not_the_model(tmp_path: Path) -> None:
    found = run(
        MODEL
        + """
begin(64 * MIB)
with offload.deferred_init(sys.argv[1]):
    model = make()
after = status("VmRSS") - before
report(after=after, parameters=sum(p.nbytes for p in model.parameters()))
""",
        tmp_path,
    )
    assert found["parameters"] == 400 * MIB
    assert found["peak"] < 128 * MIB  # the window is 64 MiB
    assert found["after"] < 32 * MIB


def test_wrapping_takes_the_budget_and_about_a_unit(tmp_path: Path) -> None:
    found = run(
        MODEL
        + """
begin(256 * MIB)
with offload.deferred_init(sys.argv[1]):
    model = make()
Path("/proc/self/clear_refs").write_text("5")
policy = offload.Policy(
    offload.Budget(host=96 * MIB), swap_dir=sys.argv[1], max_unit_bytes=16 * MIB,
    calibrate_disk=False,
)
offload.wrap(model, policy)
wrapped = status("VmHWM") - before
optimizer = offload.AdamW(model.parameters())
model(torch.rand(2, 2048)).sum().backward()
optimizer.step()
optimizer.zero_grad()
model(torch.rand(2, 2048))
report(wrapped=wrapped)
""",
        tmp_path,
    )
    assert found["wrapped"] < 96 * MIB + 2 * 16 * MIB + 16 * MIB
    assert found["peak"] < 96 * MIB + 64 * MIB


def test_an_eager_model_does_not_fit_under_that_cap(tmp_path: Path) -> None:
    found = run(
        MODEL
        + """
begin(256 * MIB)
try:
    make()
    report(fits=True)
except RuntimeError as error:
    report(fits="alloc" not in str(error))
"""
    )
    assert not found["fits"]
