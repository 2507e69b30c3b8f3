"""LoRA on a frozen base: adapters train to the same bits, the base is read and never written."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import training as t
from comparison import assert_spilled, batches, offload_adamw, seeded, torch_adamw, train, wrap
from torch import nn
from zoo import BY_NAME, Case

import offload
from offload.runtime.wrapped import wrapped
from offload.tiers.slab import Slab

# peft asks transformers for what it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
}

DEEPER = {"gpt2": {"n_layer": 8}, "llama": {"num_hidden_layers": 10}, "t5": {"num_layers": 6}}
"""Without gradients and moments, the usual ones would fit into memory."""


def adapted(case: Case, base: nn.Module | None = None, **options: bool) -> nn.Module:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=TARGETS[case.name],
        init_lora_weights=False,  # else the first gradients of A are zero
        fan_in_fan_out=case.name == "gpt2",
        task_type="CAUSAL_LM" if case.name != "t5" else "SEQ_2_SEQ_LM",
    )
    model = case.make(**DEEPER[case.name]) if base is None else base
    if options:
        model.activation_checkpointing_enable(options)
        model.enable_input_require_grads()
    return peft.get_peft_model(model, config).train()


@pytest.mark.cpu_updates  # with others the least budget holds all of the model
@pytest.mark.parametrize(
    "reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"]
)
@pytest.mark.parametrize("case", [BY_NAME[n] for n in TARGETS], ids=lambda case: case.name)
def test_adapters_train_exactly_and_the_base_is_not_written(
    case: Case, reentrant: bool | None, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return adapted(case, **({} if reentrant is None else {"use_reentrant": reentrant}))

    plain = seeded(make)
    expected = train(plain, torch_adamw(plain), batches(case))
    model = wrap(make, tmp_path)
    context = wrapped(model).context
    frozen = [unit for unit in context.units if not unit.trainable]
    spilled = [unit for unit in frozen if not unit.param_slab.pinned]
    assert spilled
    assert all(unit.grad_slab is None for unit in frozen)
    for unit in spilled:
        context.mover.settle(unit.param_slab)  # wrap() itself wrote it
    written: list[str] = []
    write_back = context.mover.write_back

    def noting(slab: Slab) -> None:
        if slab.dirty:
            written.append(slab.name)
        write_back(slab)

    before = model._offload_wrapped.counters()["disk_write_bytes"]
    context.mover.write_back = noting
    t.assert_same(expected, train(model, offload_adamw(model), batches(case)))
    assert not [name for name in written if name.startswith("parameters")]
    # Adapters are small, and so kept in memory with their gradients and moments.
    assert model._offload_wrapped.counters()["disk_write_bytes"] == before
    assert_spilled(model)


@pytest.mark.cpu_updates
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_base_that_stays_in_its_checkpoint(name: str, tmp_path: Path) -> None:
    """save_pretrained, then what a user with less memory does: nothing frozen is written."""
    case = BY_NAME[name]
    seeded(lambda: case.make(**DEEPER[name])).save_pretrained(tmp_path / "base")

    def make() -> nn.Module:
        with offload.deferred_init(tmp_path):
            base = case.make(**DEEPER[name])
        offload.load_weights(base, tmp_path / "base", strict=False, frozen="file")
        base.tie_weights()
        return adapted(case, base=base)

    plain = seeded(make)
    expected = train(plain, torch_adamw(plain), batches(case))
    model = wrap(make, tmp_path)
    context = wrapped(model).context
    spilled = [u for u in context.units if not u.trainable and not u.param_slab.pinned]
    assert spilled
    assert all(unit.param_slab.source is not None for unit in spilled)
    t.assert_same(expected, train(model, offload_adamw(model), batches(case)))
    numbers = offload.report(model).as_dict()
    assert numbers["disk_write_bytes"] == 0
    assert numbers["disk_read_bytes"] > 0
    assert all(unit.param_slab.source is not None for unit in spilled)
