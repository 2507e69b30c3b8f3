"""What becomes of moved activations when graphs are used in other ways than once each."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch
import training as t
from torch import nn

import offload

MODES = ["host", "disk", "recompute"]
X = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))  # 128 KiB


class Mlp(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 512), nn.Sigmoid()) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def wrapped(folder: Path, mode: str, nbytes: str = "1MiB", **policy: object) -> Mlp:
    kind = {"budget": offload.Budget(host="64MiB"), "swap_dir": folder, "debug": True}
    return offload.wrap(
        make(), offload.Policy(**{**kind, **policy}, activations=mode, activation_bytes=nbytes)
    )


def counters(model: nn.Module) -> dict[str, int]:
    """Once what was given up is not in flight any more."""
    deadline = time.monotonic() + 10
    found = offload.report(model).as_dict()
    while found["activation_live_bytes"] and time.monotonic() < deadline:
        time.sleep(0.01)
        found = offload.report(model).as_dict()
    return found


def grads(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_can_be_used_twice(mode: str, tmp_path: Path) -> None:
    found = []
    for model in (make(), wrapped(tmp_path, mode)):
        loss = model(X).square().mean()
        loss.backward(retain_graph=True)
        first = grads(model)
        loss.backward()
        assert_equal(grads(model), first)
        found.append(first)
    assert_equal(found[1], found[0])
    del loss
    assert counters(model)["activation_live_bytes"] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("oldest_first", [True, False])
def test_several_forwards_before_one_backward(
    mode: str, oldest_first: bool, tmp_path: Path
) -> None:
    found = []
    for model in (make(), wrapped(tmp_path, mode)):
        losses = [model(X * i).square().mean() for i in (1, 2, 3)]
        for loss in losses if oldest_first else reversed(losses):
            loss.backward()
        found.append(grads(model))
        sum(model(X * i).square().mean() for i in (1, 2, 3)).backward()  # type: ignore[union-attr]
        found.append(grads(model))
    assert_equal(found[2], found[0])
    assert_equal(found[3], found[1])


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_dropped_without_a_backward_frees_everything(mode: str, tmp_path: Path) -> None:
    model = wrapped(tmp_path, mode, nbytes="2MiB")
    for _ in range(6):
        loss = model(X).square().mean()
        assert offload.report(model).as_dict()["activation_live_bytes"] > 0
        del loss
        gc.collect()
        assert counters(model)["activation_live_bytes"] == 0
    home = model._offload_wrapped.context.activations
    assert home.mover.home.usage()["in_use"] == 0
    store = home.store
    assert store is None or store.stats()["objects"] <= 16


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_raises_frees_everything(mode: str, tmp_path: Path) -> None:
    model = wrapped(tmp_path, mode)
    model(X).sum().backward()
    expected = grads(model)
    model.blocks[2].register_forward_hook(_fail)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            model(X)
    gc.collect()
    assert counters(model)["activation_live_bytes"] == 0
    model.blocks[2]._forward_hooks.popitem()
    model(X).sum().backward()
    assert_equal(grads(model), expected)


def _fail(module: nn.Module, args: object, output: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_grad_costs_nothing(mode: str, tmp_path: Path) -> None:
    model = wrapped(tmp_path, mode)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            model(X)
    assert offload.report(model).as_dict()["activation_saved_bytes"] == 0


@pytest.mark.parametrize("mode", ["keep", "host", "disk"])
def test_an_activation_changed_in_place_raises_what_torch_raises(mode: str, tmp_path: Path) -> None:
    class Changes(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.blocks[0](x)  # the sigmoid saves its result
            z = y * 2
            y.add_(1)
            return z + y

    torch.manual_seed(0)
    plain = Changes()
    more = {} if mode == "keep" else {"activation_bytes": "1MiB"}
    policy = offload.Policy(
        budget=offload.Budget(host="64MiB"), swap_dir=tmp_path, activations=mode, **more
    )
    for model in (plain, offload.wrap(Changes(), policy)):
        with pytest.raises(RuntimeError, match=r"modified by an inplace .* at version 1"):
            model(X).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_the_input_of_the_user_stays_the_users(mode: str, tmp_path: Path) -> None:
    model, x = wrapped(tmp_path, mode), X.clone().requires_grad_()
    address = x.data_ptr()
    model(x).sum().backward()
    assert x.data_ptr() == address
    assert torch.equal(x, X)
    reference, theirs = make(), X.clone().requires_grad_()
    reference(theirs).sum().backward()
    assert x.grad is not None
    assert theirs.grad is not None
    assert torch.equal(x.grad, theirs.grad)


def test_hooks_of_the_user_come_first(tmp_path: Path) -> None:
    model, packed = wrapped(tmp_path, "disk"), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.nbytes)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(X).sum()
    assert packed
    assert offload.report(model).as_dict()["activation_saved_bytes"] == 0
    loss.backward()


def test_buffers_and_parameters_are_left_alone(tmp_path: Path) -> None:
    class Masked(Mlp):
        def __init__(self) -> None:
            super().__init__(1)
            self.register_buffer("mask", torch.rand(64, 512))
            self.outer = [nn.Parameter(torch.randn(512, 512))]  # not one of the model's

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.mask * self.mask[:, :512].t().t()) @ self.outer[0]

    model = offload.wrap(
        Masked(),
        offload.Policy(budget=offload.Budget(host="64MiB"), swap_dir=tmp_path, activations="disk"),
    )
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    # Of mul: its other operand. Of matmul: the product.
    assert offload.report(model).as_dict()["activation_saved_bytes"] <= 2 * X.nbytes


def test_subclasses_and_sparse_tensors_are_left_alone(tmp_path: Path) -> None:
    class Own(torch.Tensor):
        pass

    model = wrapped(tmp_path, "disk")
    home = model._offload_wrapped._saved._activations
    for tensor in (X.as_subclass(Own), X.to_sparse(), nn.Parameter(X), X.to("meta")):
        assert home.save(tensor) is None
    conjugate = torch.view_as_complex(X.view(64, 256, 2)).conj()
    assert home.save(conjugate) is None
    assert torch.func.vmap(lambda x: x * (home.save(x) is None))(X).equal(X)
    assert home.save(X) is not None


def test_unwrap_between_forward_and_backward_says_so(tmp_path: Path) -> None:
    model = wrapped(tmp_path, "disk")
    loss = model(X).sum()
    offload.unwrap(model)
    with pytest.raises(offload.OffloadError, match="unwrapped between"):
        loss.backward()


def test_a_module_named_as_a_unit_is_recomputed_whole(tmp_path: Path) -> None:
    for units in (["blocks.0", "blocks.2"], None):
        model = wrapped(tmp_path, "recompute", units=units)
        found = [name for name, m in model.named_modules() if "forward" in m.__dict__]
        assert found == (units or [f"blocks.{i}" for i in range(4)])
        model(X).sum().backward()
        ours, reference = grads(model), make()
        reference(X).sum().backward()
        assert_equal(ours, grads(reference))


def test_hooks_on_a_recomputed_block_run_once(tmp_path: Path) -> None:
    model, calls = wrapped(tmp_path, "recompute"), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("after"))
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    model(X).sum().backward()
    assert calls == ["before", "after"]


class Counts(nn.Module):
    """Keeps a buffer that its result depends on, and replaces another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(width))
        self.register_buffer("table", torch.ones(256, 256))  # large, and never changed

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y: torch.Tensor = torch.tanh(self.inner(x) * scale * float(self.calls) + self.last)
        self.last = y.detach().mean(0)
        return y


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counts(512) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=x.sigmoid())
        return x


def test_buffers_that_a_block_changes_are_as_in_its_forward(tmp_path: Path) -> None:
    found = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model: nn.Module = Counting()
        if wrap:
            policy = offload.Policy(
                budget=offload.Budget(host="64MiB"), swap_dir=tmp_path, activations="recompute"
            )
            offload.wrap(model, policy)
        results = []
        for mode in (True, False, True):
            model.train(mode)
            loss = model(X).sum() + model(X * 2).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            results += grads(model)
        found.append(results + [b.clone() for b in model.buffers()])
    assert_equal(found[1], found[0])


def test_a_dropped_model_is_freed(tmp_path: Path) -> None:
    for mode in MODES:
        model = wrapped(tmp_path, mode)
        model(X).sum().backward()
        model.zero_grad()
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None, mode


def test_policy_says_what_is_wrong(tmp_path: Path) -> None:
    budget = offload.Budget(host="64MiB")
    for wrong, message in (
        ({"activations": "nvme"}, "expected one of keep, host, disk, recompute, auto"),
        ({"activations": "disk"}, r"needs a directory .* Policy\(swap_dir"),
        ({"activation_bytes": "1MiB"}, 'no meaning with activations="keep"'),
        ({"activations": "host", "activation_bytes": "64MiB"}, "less than the host budget"),
        ({"activations": "host", "activation_bytes": 0}, "more than 0"),
    ):
        with pytest.raises(offload.PolicyError, match=message):
            offload.Policy(budget=budget, **wrong)


def test_a_budget_without_room_for_activations_is_refused(tmp_path: Path) -> None:
    least = t.least_budget(t.Stack)
    model = t.Stack()
    with pytest.raises(offload.BudgetError, match="4194304 of them for activations"):
        offload.wrap(
            model,
            offload.Policy(
                budget=offload.Budget(host=least),
                swap_dir=tmp_path,
                activations="disk",
                **t.SMALL_BLOCKS,
            ),
        )
    model(torch.zeros(1, 1, dtype=torch.long))  # as it was


def test_a_full_disk_is_an_error_in_the_forward(tmp_path: Path) -> None:
    model = wrapped(tmp_path, "disk", budget=offload.Budget(host="64MiB", disk="6MiB"))
    with pytest.raises(offload.SwapSpaceError, match=r"Budget\(disk=6291456\) is too small"):
        model(X)
    gc.collect()
    assert counters(model)["activation_live_bytes"] == 0
    with torch.no_grad():
        assert torch.equal(model(X), make()(X))
    offload.unwrap(model)(X).sum().backward()


def test_a_read_that_fails_is_an_error_in_the_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(tmp_path, "disk", nbytes="400KiB")
    loss = model(X).sum()
    home = model._offload_wrapped.context.activations

    def fail(*_: object, **__: object) -> None:
        raise offload.SwapIOError(5, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(home.mover, "_start_read", fail)
        with pytest.raises(offload.SwapIOError, match="the disk is gone"):
            loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()  # nothing was lost
    reference = make()
    reference(X).sum().backward()
    assert_equal(grads(model), grads(reference))


def test_older_torch_moves_activations_and_refuses_to_recompute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.6 and 2.7, which do not tell the active hooks."""
    monkeypatch.setattr("offload.runtime.saved_tensors._TOP_HOOKS", "_not_there")
    for mode in ("recompute", "auto"):
        with pytest.raises(offload.UnsupportedError, match=r"torch 2\.8 or newer"):
            wrapped(tmp_path, mode)
    for kind in (t.Stack, t.Checkpointed):
        loop = t.Loop(steps=2)
        ours = t.offloaded(
            kind, loop, tmp_path, 18 << 20, activations="disk", activation_bytes="1MiB"
        )
        t.assert_same(t.plain(kind, loop), ours)
