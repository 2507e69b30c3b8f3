"""A frozen base in a checkpoint, with adapters to be trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn

import offload
from offload.runtime.wrapped import wrapped

save_file: Callable[..., None] = pytest.importorskip("safetensors.torch").save_file

WIDTH = 256
POLICY: dict[str, Any] = {
    "io_block_bytes": 1 << 16,
    "max_unit_bytes": 1 << 20,
    "calibrate_disk": False,
    "debug": True,
}


class Lora(nn.Module):
    """A frozen linear layer and a trained correction of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 8, bias=False)
        self.up = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + self.up(self.down(x))
        return y


class Base(nn.Module):
    """Blocks of 512 KiB; the int8 table gives what follows it in the file odd offsets."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randint(0, 9, (7,), dtype=torch.int8), requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def adapted(base: nn.Module) -> nn.Module:
    """What get_peft_model does: other names, frozen weights."""
    torch.manual_seed(1)
    for block in base.blocks:
        block[0] = Lora(block[0])
        block[2].requires_grad_(False)
    return base


def checkpoint(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    state = {k: v.clone() for k, v in Base(seed=7).state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return state
    places = {}
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / f"part{i}.safetensors")
        places.update(dict.fromkeys(part, f"part{i}.safetensors"))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def policy_for(folder: Path) -> offload.Policy:
    least = t.least_budget(lambda: adapted(Base()), **POLICY)
    return offload.Policy(offload.Budget(host=least), swap_dir=folder, **POLICY)


def before_wrap(folder: Path, deferred: bool = True) -> nn.Module:
    """As for LoRA on a base that does not fit: loaded, adapted, wrapped."""
    if deferred:
        with offload.deferred_init(folder):
            base = Base()
    else:
        base = Base()
    offload.load_weights(base, folder, frozen="file")
    return offload.wrap(adapted(base), policy_for(folder))


def after_wrap(folder: Path) -> nn.Module:
    model = Base().requires_grad_(False)
    model.blocks[7].requires_grad_(True)
    offload.wrap(model, policy_for(folder))
    offload.load_weights(model, folder, frozen="file")
    return model


def in_files(model: nn.Module) -> list[str]:
    return [u.name for u in wrapped(model).context.units if u.param_slab.source is not None]


def spilled(model: nn.Module) -> set[str]:
    found = {u.name for u in wrapped(model).context.units if not u.param_slab.pinned}
    assert {"blocks.2", "blocks.3", "blocks.4"} < found
    return found


def steps(model: nn.Module, count: int = 3) -> list[float]:
    kind = offload.AdamW if "_offload_wrapped" in model.__dict__ else torch.optim.AdamW
    options = {} if kind is offload.AdamW else {"foreach": False}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(params, lr=1e-2, **options)
    losses = []
    for step in range(count):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
