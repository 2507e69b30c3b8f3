"""``transformers.Trainer`` trains a wrapped model as any other, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from comparison import assert_spilled, batches, offload_adamw, seeded, torch_adamw, wrap
from safetensors.torch import load_file
from torch import nn
from zoo import BY_NAME, Batch

CASE = BY_NAME["gpt2"]  # with dropout


class Rows(torch.utils.data.Dataset[Batch]):
    def __init__(self, count: int) -> None:
        self._rows = [
            {key: value[i] for key, value in batch.items()}
            for batch in batches(CASE, count // 2)
            for i in range(2)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        return self._rows[index]


def trainer(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    folder: Path,
    **options: Any,
) -> hf.Trainer:
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **options,
    )
    return hf.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(16),
        eval_dataset=Rows(4),
        optimizers=(optimizer, scheduler),
    )


NOTED = ("loss", "grad_norm", "eval_loss", "learning_rate")


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"activation_checkpointing": True, "max_grad_norm": 0.0}],
    ids=["fp32", "bf16", "checkpointing"],
)
def test_trainer_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    plain = seeded(CASE.make)
    theirs = trainer(plain, torch_adamw, tmp_path / "plain", **options)
    theirs.train()
    model = wrap(CASE.make, tmp_path)
    ours = trainer(model, offload_adamw, tmp_path / "offloaded", **options)
    ours.train()

    def history(run: hf.Trainer) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k in NOTED} for row in run.state.log_history]

    assert history(ours) == history(theirs)
    assert sum("loss" in row for row in history(ours)) == 4
    assert sum("eval_loss" in row for row in history(ours)) == 2
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert_spilled(model)
    for step in (2, 4):
        saved = [tmp_path / run / f"checkpoint-{step}" for run in ("plain", "offloaded")]
        a, b = (load_file(folder / "model.safetensors") for folder in saved)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        a, b = (torch.load(folder / "optimizer.pt")["state"] for folder in saved)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
