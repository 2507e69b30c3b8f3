"""Helpers of the tests of the native optimizers: rules, models, references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import optim_db

import offload
from offload import Budget, Policy, optim

OURS = {cls.__name__: cls for cls in (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad)}
OURS |= {"RMSprop": optim.RMSprop}
RULES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Lion", {"weight_decay": 0.1}),
]
"""One of each, with as many states as it can have."""
RULE_IDS = [name for name, _ in RULES]
NARROW_RULES = [
    (name, {key: value for key, value in kwargs.items() if key != "centered"})
    for name, kwargs in RULES
]
"""Of those, what may have narrow states."""


class ReferenceLion(Optimizer):
    """The authors' program for torch, operation by operation."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, "foreach": foreach, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                exp_avg = state["exp_avg"]
                if group["weight_decay"] != 0:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                update = exp_avg * beta1 + grad * (1 - beta1)
                param.add_(update.sign_(), alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
        return loss


def make(name: str, params: Any, **kwargs: Any) -> Optimizer:
    """One of ours."""
    return getattr(optim, name)(params, **kwargs)


def reference(name: str, params: Any, **kwargs: Any) -> Optimizer:
    """torch's for-loop path, or what stands for it."""
    cls: Any = ReferenceLion if name == "Lion" else getattr(torch.optim, name)
    return cls(params, **{"foreach": False, **kwargs})


def samples() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every input of torch's data base for our rules, and more of Lion and of SGD."""
    for info in optim_db:
        if info.name in OURS:
            for sample in info.optim_inputs_func("cpu"):
                if not sample.kwargs.get("capturable"):
                    yield info.name, sample.kwargs, sample.desc
    yield "SGD", {"momentum": 0.9, "dampening": 0.5, "maximize": True, "lr": 0.1}, "dampening"
    yield "Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}, "decoupled"
    yield "RMSprop", {"momentum": 0.9}, "momentum alone"
    for kwargs in ({}, {"weight_decay": 0.1}, {"maximize": True, "betas": (0.5, 0.7)}):
        yield "Lion", kwargs, str(kwargs)
    for name in ("AdamW", "Adam", "Adagrad", "SGD", "RMSprop"):
        yield name, {"lr": torch.tensor(3e-3), "weight_decay": 0.1}, "tensor lr"


class Part(nn.Module):
    """Parameters of odd sizes; a transposed one; larger than what is never spilled."""

    def __init__(self, dtype: torch.dtype, scale: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def value(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.matrix = nn.Parameter(value(31 * scale, 47))
        self.vector = nn.Parameter(value(997))
        self.turned = nn.Parameter(value(40, 30 * scale).t())
        self.scalar = nn.Parameter(value())
        self.empty = nn.Parameter(value(0, 3))
        self.cube = nn.Parameter(value(3, 5, 61))


class Model(nn.Module):
    """Two parts that are units of a wrapped model; there is no forward."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: int = 60) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(dtype, scale) for _ in range(2))


def set_gradients(step: int, *models: nn.Module, missing: bool = True) -> None:
    """Give the parameters of all models the same gradients, of which some are missing."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, alike in enumerate(zip(*(m.parameters() for m in models), strict=True)):
        grad = torch.randn(alike[0].shape, generator=generator).to(alike[0].dtype)
        for param in alike:
            absent = missing and ((step == 1 and i == 1) or i == 9)
            param.grad = None if absent else grad.clone()


def wrapped(model: nn.Module, folder: Path, **kwargs: Any) -> nn.Module:
    """Wrap `model` with as little memory as there can be."""
    options: dict[str, Any] = {"io_block_bytes": 1 << 16, "calibrate_disk": False, "debug": True}
    options |= {"swap_dir": folder, **kwargs}
    try:
        return offload.wrap(model, Policy(Budget(4096), **options))
    except offload.BudgetError as error:
        least = int(str(error).split("would do is ")[1].split(" ")[0])
    return offload.wrap(model, Policy(Budget(least), **options))


def disk_policy(folder: Path, host: int = 1 << 20) -> Policy:
    """For plain models: little memory, small blocks."""
    return Policy(Budget(host), swap_dir=folder, io_block_bytes=1 << 16, calibrate_disk=False)


def values(model: nn.Module) -> list[torch.Tensor]:
    """Copies of the parameters."""
    return [param.clone().detach() for param in model.parameters()]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1) for t in (a, b)]
    return a.numel() == 0 or torch.equal(*(t.view(torch.uint8) for t in flat))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, _), a, b in zip(ours.named_parameters(), values(ours), values(theirs), strict=True):
        assert same_bits(a, b), name


def assert_same_state(
    ours: dict[str, Any], theirs: dict[str, Any], extra: Sequence[str] = ()
) -> None:
    """Equal states of two state_dicts: parameters; names, their order, types and bits."""
    assert sorted(ours["state"]) == sorted(theirs["state"])
    for key, state in theirs["state"].items():
        found = ours["state"][key]
        assert [name for name in found if name not in extra] == list(state), key
        for name, value in state.items():
            assert same_bits(found[name], value), (key, name)


def copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Tensors among hyperparameters are not shared."""
    return deepcopy(kwargs)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.out(torch.tanh(self.mix(self.norm(x))))
        return y


class Net(nn.Module):
    """For real loops: a frozen layer, an unused one, blocks of 130 KB."""

    def __init__(self, width: int = 90, layers: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.blocks[1].mix.requires_grad_(False)
        self.head = nn.Linear(width, 50)
        self.unused = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(50, (4, 9), generator=generator)
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
