"""Policy(param_dtype=...): compute in 16 bits, fp32 masters seeded from the fp32 model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from mixed import (
    Forward,
    Fp32Odds,
    Narrow,
    Odds,
    assert_state,
    odd_loss,
    policy_for,
    seeded,
)
from torch import nn

import offload

ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
IN_MEMORY = 1 << 28


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=128, n_layer=3, n_head=2, n_positions=32, bos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def gpt2_loss(model: nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(step))
    torch.manual_seed(step)  # of dropout
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def compare(
    make: t.Model,
    loss_of: Forward,
    folder: Path,
    steps: int = 4,
    micro_batches: int = 2,
    in_backward: bool = False,
    **options: Any,
) -> None:
    """Train both ways: losses, gradients and parameters at each step are the same bits."""
    policy = policy_for(make, folder, **options)
    reference = Narrow(seeded(make), policy.param_dtype, **ADAMW)
    model = offload.wrap(seeded(make), policy)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = offload.AdamW(params, step_in_backward=in_backward, **ADAMW)
    for step in range(steps):
        for batch in range(micro_batches):
            expected = loss_of(reference, 10 * step + batch)
            expected.backward()  # type: ignore[no-untyped-call]
            found = loss_of(model, 10 * step + batch)
            found.backward()  # type: ignore[no-untyped-call]
            assert found.item() == expected.item()
        theirs = dict(reference.inner.named_parameters())
        for name, param in model.named_parameters():
            assert param.dtype is theirs[name].dtype, name
            if not in_backward and param.grad is not None:
                assert torch.equal(param.grad.clone(), theirs[name].grad), name
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            for name, param in model.named_parameters():
                assert torch.equal(param.detach().clone(), theirs[name]), name
    assert_state(model.state_dict(), reference.full_state())
    report = offload.report(model)
    assert report.plan.spills is (options.get("budget") != IN_MEMORY)
    assert report.as_dict()["arena_peak_bytes"] <= report.plan.budget_bytes
    offload.unwrap(model)
    assert_state(dict(model.state_dict()), reference.full_state())


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize(
    ("make", "loss_of"), [(gpt2, gpt2_loss), (Odds, odd_loss)], ids=["gpt2", "odd"]
)
def test_training_is_that_of_explicit_masters(
    make: t.Model, loss_of: Forward, lazy: bool, tmp_path: Path
) -> None:
    compare(make, loss_of, tmp_path, lazy_step=lazy)


@pytest.mark.parametrize(
    ("make", "loss_of"), [(gpt2, gpt2_loss), (Odds, odd_loss)], ids=["gpt2", "odd"]
)
def test_steps_in_the_backward(make: t.Model, loss_of: Forward, tmp_path: Path) -> None:
    compare(make, loss_of, tmp_path, micro_batches=1, in_backward=True)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_model_that_fits_into_memory(in_backward: bool, tmp_path: Path) -> None:
    micro_batches = 1 if in_backward else 2
    for make, loss_of in ((gpt2, gpt2_loss), (Odds, odd_loss)):
        compare(
            make,
            loss_of,
            tmp_path,
            micro_batches=micro_batches,
            in_backward=in_backward,
            budget=IN_MEMORY,
        )


def test_fp16(tmp_path: Path) -> None:
    compare(Fp32Odds, odd_loss, tmp_path, param_dtype=torch.float16)
    model = offload.wrap(Odds(), policy_for(Odds, tmp_path))
    with pytest.raises(offload.UnsupportedError, match=r"narrow\.weight is torch\.bfloat16"):
        offload.wrap(Odds(), policy_for(Odds, tmp_path, 1 << 28, param_dtype=torch.float16))
    assert model.blocks[0].narrow.weight.dtype is torch.bfloat16


def test_small_units_and_recomputed_blocks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_unit_bytes": 1 << 17, "activations": "recompute"}
    compare(gpt2, gpt2_loss, tmp_path, budget=8 << 20, **options)
