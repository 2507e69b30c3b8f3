"""offload.AdamW on models that are not wrapped: a drop-in for torch.optim.AdamW, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import offload
from offload import UnsupportedError

Make = Callable[..., torch.optim.Optimizer]
MAKERS: tuple[Make, Make] = (offload.AdamW, torch.optim.AdamW)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert same_bits(a, b), name


def assert_same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Equal state_dicts: keys, order, types and bits."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert list(a["state"]) == list(b["state"])
    for key, state in a["state"].items():
        other = b["state"][key]
        assert list(state) == list(other)
        for what, value in state.items():
            assert value.dtype == other[what].dtype
            assert same_bits(value, other[what]), (key, what)


class Net(nn.Module):
    """Layers of odd sizes, a frozen one, one without gradients, a 0-dim and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.frozen = nn.Linear(13, 13)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(13, 3)
        self.unused = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu() * self.scale + self.empty.sum()
        return self.last(self.frozen(hidden))


def pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net)


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean() * 10


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    after: Callable[[int], None] = lambda step: None,
    clip: float | None = None,
    set_to_none: bool = True,
) -> None:
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(net, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        after(step)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    {"weight_decay": 0.0},
    {"maximize": True},
    {"amsgrad": True},
    {"lr": torch.tensor(3e-3)},
    {"lr": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_options(options: dict[str, Any], foreach: bool) -> None:
    if foreach and isinstance(options.get("lr"), torch.Tensor):
        pytest.skip("torch refuses a tensor lr with foreach")
    nets = pair()
    optimizers = [
        make(net.parameters(), **copy.deepcopy(options), foreach=foreach)
        for make, net in zip(MAKERS, nets, strict=True)
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(8))
    assert_same(*nets)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("clip", [None, 0.01, 1e9])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipping_and_zero_grad(clip: float | None, set_to_none: bool) -> None:
    nets = pair()
    for make, net in zip(MAKERS, nets, strict=True):
        train(net, make(net.parameters()), range(6), clip=clip, set_to_none=set_to_none)
    assert_same(*nets)


def groups(net: Net) -> list[dict[str, Any]]:
    return [
        {"params": net.first.parameters(), "lr": 1e-2},
        {"params": net.norm.parameters(), "weight_decay": 0.0, "betas": (0.5, 0.9)},
        {"params": [*net.last.parameters(), net.scale, net.empty], "maximize": True, "eps": 1e-4},
        {"params": net.unused.parameters()},
    ]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_and_groups(name: str, tensor_lr: bool) -> None:
    nets = pair()
    optimizers = []
    for make, net in zip(MAKERS, nets, strict=True):
        lr = torch.tensor(2e-3) if tensor_lr else 2e-3
        optimizer = make(groups(net), lr=lr, foreach=False)
        scheduler = SCHEDULERS[name](optimizer)
        train(net, optimizer, range(10), after=lambda step, s=scheduler: s.step())  # type: ignore[misc]
        optimizers.append(optimizer)
    assert_same(*nets)
    assert_same_state(*optimizers)


def test_named_parameters() -> None:
    nets = pair()
    optimizers = [make(net.named_parameters()) for make, net in zip(MAKERS, nets, strict=True)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(2))
    assert "param_names" in optimizers[0].state_dict()["param_groups"][0]
    assert_same_state(*optimizers)


def test_add_param_group_in_training() -> None:
    nets = pair()
    optimizers = [make(net.first.parameters()) for make, net in zip(MAKERS, nets, strict=True)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(3))
        optimizer.add_param_group({"params": net.last.parameters(), "lr": 0.05})
        train(net, optimizer, range(3, 6))
    assert_same(*nets)
    assert_same_state(*optimizers)


def test_closure() -> None:
    nets = pair()
    losses: list[list[float]] = []
    for make, net in zip(MAKERS, nets, strict=True):
        optimizer = make(net.parameters())
        seen = []
        for step in range(3):

            def closure(net: Net = net, optimizer: Any = optimizer, step: int = step) -> Any:
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            with torch.no_grad():  # step() enables gradients for the closure itself
                seen.append(float(optimizer.step(closure)))
        losses.append(seen)
    assert losses[0] == losses[1]
    assert_same(*nets)


def test_step_hooks() -> None:
    net, _ = pair()
    optimizer = offload.AdamW(net.parameters())
    calls: list[str] = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    after = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    train(net, optimizer, range(2))
    assert calls == ["pre", "post"] * 2
    before.remove()
    after.remove()
    train(net, optimizer, range(2))
    assert len(calls) == 4


def odd_parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    base = torch.randn(9, 8)
    return {
        "contiguous": nn.Parameter(base.clone()),
        "transposed": nn.Parameter(torch.randn(5, 7).t()),
        "permuted": nn.Parameter(torch.randn(2, 3, 4, 5).permute(0, 3, 1, 2)),
        "channels_last": nn.Parameter(
            torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        ),
        "with gaps": nn.Parameter(base[:, ::2]),
        "unaligned": nn.Parameter(torch.randn(100)[3:70]),
        "scalar": nn.Parameter(torch.tensor(0.25)),
        "empty": nn.Parameter(torch.empty(3, 0)),
        "one": nn.Parameter(torch.randn(1, 1, 1)),
    }


@pytest.mark.parametrize("contiguous_grad", [True, False])
@pytest.mark.parametrize("name", odd_parameters())
def test_layouts(name: str, contiguous_grad: bool) -> None:
    params = [odd_parameters()[name] for _ in MAKERS]
    strides = params[0].stride()
    optimizers = [make([param]) for make, param in zip(MAKERS, params, strict=True)]
    for step in range(4):
        for param, optimizer in zip(params, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad if contiguous_grad else torch.empty_like(param).copy_(grad).detach()
            optimizer.step()
    assert params[0].stride() == strides
    assert same_bits(*params)
    assert_same_state(*optimizers)


def test_gaps_of_a_parameter_are_not_written() -> None:
    base = torch.arange(20.0)
    param = nn.Parameter(base[::2])
    param.grad = torch.ones(10)
    offload.AdamW([param], lr=0.5).step()
    assert torch.equal(base[1::2], torch.arange(1.0, 20.0, 2.0))


@pytest.mark.parametrize("layout", ["contiguous", "with gaps"])
def test_autograd_notices_the_update(layout: str) -> None:
    """A backward whose graph needs the old values must fail, as it does with torch's own."""
    for make in MAKERS:
        param = odd_parameters()[layout]
        loss = param.square().sum()
        loss.backward(retain_graph=True)
        make([param]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("first", [0, 1], ids=["ours first", "torch first"])
def test_state_dict_exchange_in_training(first: int) -> None:
    net, reference = pair()
    theirs = torch.optim.AdamW(groups(reference))
    train(reference, theirs, range(8))

    optimizer = MAKERS[first](groups(net))
    train(net, optimizer, range(4))
    saved = optimizer.state_dict()
    optimizer = MAKERS[1 - first](groups(net))
    optimizer.load_state_dict(saved)
    train(net, optimizer, range(4, 8))
    assert_same(net, reference)
    assert_same_state(optimizer, theirs)


def test_state_dict_through_a_file() -> None:
    net, reference = pair()
    optimizer = offload.AdamW(net.parameters())
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    reference.load_state_dict(saved["net"])
    resumed = offload.AdamW(reference.parameters())
    resumed.load_state_dict(saved["optimizer"])
    for model, o in ((net, optimizer), (reference, resumed)):
        train(model, o, range(3, 6))
    assert_same(net, reference)
    assert_same_state(optimizer, resumed)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_model_and_optimizer(copier: Callable[[Any], Any]) -> None:
    net, _ = pair()
    optimizer = offload.AdamW(net.parameters())
    train(net, optimizer, range(2))
    twin, twin_optimizer = copier((net, optimizer))
    train(net, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert_same(net, twin)
    assert_same_state(optimizer, twin_optimizer)


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    saved = copy.deepcopy(optimizer.state_dict())
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    return saved["param_groups"], str(saved["state"]), str(params)


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_options_that_are_refused(option: str) -> None:
    net, _ = pair()
    with pytest.raises(UnsupportedError, match=option):
        offload.AdamW(net.parameters(), **{option: True})

    optimizer = offload.AdamW(net.first.parameters())
    train(net, optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(UnsupportedError, match=option):
        optimizer.add_param_group({"params": net.last.parameters(), option: True})
    other = torch.optim.AdamW(net.first.parameters(), foreach=False).state_dict()
    other["param_groups"][0][option] = True
    with pytest.raises(UnsupportedError, match=option):
        optimizer.load_state_dict(other)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1e-3, "Invalid learning rate: -0.001"),
        ("lr", float("nan"), "Invalid learning rate: nan"),
        ("lr", torch.tensor(-1.0), "Invalid learning rate: -1.0"),
        ("lr", torch.ones(2), "Tensor lr must be 1-element"),
        ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
        ("weight_decay", -0.1, "Invalid weight_decay value: -0.1"),
        ("betas", (1.0, 0.9), "Invalid beta parameter at index 0: 1.0"),
        ("betas", (0.9, -0.1), "Invalid beta parameter at index 1: -0.1"),
    ],
)
def test_values_that_are_refused_as_torch_does(name: str, value: Any, message: str) -> None:
    net, _ = pair()
    for make in MAKERS:
        with pytest.raises(ValueError, match=message):
            make(net.parameters(), **{name: value})
    optimizer = offload.AdamW(net.first.parameters())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": net.last.parameters(), name: value})
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 5, dtype=dtype))
    with pytest.raises(UnsupportedError, match=rf"{dtype}.*\(2, 5\)"):
        offload.AdamW([good, bad])
    optimizer = offload.AdamW([good])
    before = snapshot(optimizer)
    with pytest.raises(UnsupportedError, match=rf"{dtype}.*\(2, 5\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3)), bad]})
    assert snapshot(optimizer) == before


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="meta"):
        offload.AdamW([nn.Parameter(torch.ones(3, device="meta"))])


def test_sparse_gradient_is_refused_before_anything_is_updated() -> None:
    dense = nn.Parameter(torch.ones(3))
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = offload.AdamW([dense, embedding.weight])
    embedding(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3)
    before = snapshot(optimizer)
    with pytest.raises(UnsupportedError, match="sparse"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_empty_and_repeated_parameter_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        offload.AdamW([])
    param = nn.Parameter(torch.ones(2))
    optimizer = offload.AdamW([param])
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1
