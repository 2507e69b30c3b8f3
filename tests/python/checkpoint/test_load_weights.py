"""load_weights(): as load_state_dict of the same file, for models in every state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training as t
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.checkpoint.safetensors_file import stored_tensors

save_file: Callable[..., None] = pytest.importorskip("safetensors.torch").save_file

BUDGET = 16 << 20
TOKENS = torch.arange(12).view(1, 12)


def saved(path: Path, model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What `model` would have to hold after loading; it is written to `path`."""
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, path)
    return state


def source(seed: int = 7, **kinds: Any) -> t.Stack:
    torch.manual_seed(seed)
    return t.Stack(**kinds)


def assert_holds(model: nn.Module, expected: nn.Module) -> None:
    found = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_wrapped_model_holds_what_the_file_does(dtype: Any, tmp_path: Path) -> None:
    state = saved(tmp_path / "model.safetensors", source(), dtype)
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    plain = t.Stack()
    plain.load_state_dict(state)
    found = offload.load_weights(model, tmp_path)
    assert found == ([], [])
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert_holds(model, plain)


def test_shards_and_their_index(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in source().state_dict().items()}
    places = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = dict(list(state.items())[number::3])
        save_file(part, tmp_path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (tmp_path, index):
        model = t.wrapped(t.Stack, tmp_path, BUDGET)
        offload.load_weights(model, path)
        assert_holds(model, source())


def test_a_deferred_model_before_and_after_wrap(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    saved(file, source())
    policy = offload.Policy(offload.Budget(host=BUDGET), swap_dir=tmp_path, **t.SMALL_BLOCKS)
    for wrap_first in (True, False):
        with offload.deferred_init(tmp_path):
            model = t.Stack()
        if wrap_first:
            offload.wrap(model, policy)
        offload.load_weights(model, file)
        if not wrap_first:
            offload.wrap(model, policy)
        assert_holds(model, source())


def test_training_goes_on_from_the_loaded_weights(tmp_path: Path) -> None:
    """Pending updates are not lost and do not run over what was loaded."""
    file = tmp_path / "weights.safetensors"
    state = saved(file, source())
    torch.manual_seed(0)
    plain = t.Stack()
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    loop = t.Loop(steps=2)
    ours = offload.AdamW(t.groups(model), lr=1e-2)
    theirs = torch.optim.AdamW(t.groups(plain), lr=1e-2, foreach=False)
    t.assert_same(t.train(plain, theirs, loop), t.train(model, ours, loop))
    offload.load_weights(model, file)
    plain.load_state_dict(state)
    t.assert_same(t.train(plain, theirs, loop), t.train(model, ours, loop))


def test_master_copies_follow(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)]).to(torch.bfloat16)

    file = tmp_path / "weights.safetensors"
    expected = saved(file, make())
    policy = offload.Policy(offload.Budget(host="4MiB"), swap_dir=tmp_path, io_block_bytes=2**16)
    model = offload.wrap(make(), policy)
    optimizer = offload.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.ones(1, 256, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    offload.load_weights(model, file)
    model(torch.zeros(1, 256, dtype=torch.bfloat16)).sum().backward()
    model[0].weight.grad.zero_()
    optimizer.step()
    assert torch.equal(model.state_dict()["0.weight"], expected["0.weight"])


def test_frozen_units_and_buffers(tmp_path: Path) -> None:
    class Frozen(t.Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.convs.requires_grad_(False)
            self.register_buffer("offset", torch.rand(64), persistent=False)

    torch.manual_seed(7)
    other = Frozen()
    other.convs[0][1].running_mean.fill_(3)
    other.convs[0][1].num_batches_tracked.fill_(5)
    saved(tmp_path / "model.safetensors", other)
    model = t.wrapped(Frozen, tmp_path, 12 << 20)
    stride = model.convs[1][0].weight.stride()
    offset = model.offset.clone()
    offload.load_weights(model, tmp_path)
    assert_holds(model, other)
    assert torch.equal(model.offset, offset)
    assert model.convs[1][0].weight.stride() == stride != other.convs[0][0].weight.stride()


@pytest.mark.parametrize("left", ["embed.weight", "head.weight", "both"])
def test_one_name_of_tied_weights_is_enough(left: str, tmp_path: Path) -> None:
    other = source(tied=True)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    for name in {"embed.weight", "head.weight"} - {left}:
        if left != "both":
            del state[name]
    save_file(state, tmp_path / "model.safetensors")
    model = t.wrapped(lambda: t.Stack(tied=True), tmp_path, BUDGET)
    assert offload.load_weights(model, tmp_path) == ([], [])
    assert_holds(model, other)
    assert model.head.weight is model.embed.weight


def test_a_part_of_a_wrapped_model(tmp_path: Path) -> None:
    other = source()
    saved(tmp_path / "block.safetensors", other.blocks[4])
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    offload.load_weights(model.blocks[4], tmp_path / "block.safetensors")
    assert_holds(model.blocks[4], other.blocks[4])


def change(kind: str, state: dict[str, torch.Tensor]) -> None:
    if kind == "missing":
        del state["blocks.3.mix.weight"], state["scale"]
    elif kind == "unexpected":
        state["blocks.99.mix.weight"] = torch.zeros(3)
    elif kind == "shape":
        state["blocks.3.mix.weight"] = torch.zeros(256, 512)
    elif kind == "dtype":
        state["blocks.3.mix.weight"] = state["blocks.3.mix.weight"].to(torch.complex64)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing: scale, blocks\.3\.mix\.weight$"),
        ("unexpected", r"unexpected: blocks\.99\.mix\.weight$"),
        ("shape", r"blocks\.3\.mix\.weight is \[256, 512\], expected \[512, 256\]"),
        ("dtype", r"blocks\.3\.mix\.weight is C64, expected torch\.float32"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    kind: str, message: str, tmp_path: Path
) -> None:
    state = {k: v.clone() for k, v in source().state_dict().items()}
    change(kind, state)
    save_file(state, tmp_path / "model.safetensors")
    model = t.wrapped(t.Stack, tmp_path, BUDGET)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(offload.CheckpointError, match=message) as caught:
        offload.load_weights(model, tmp_path)
    assert "nothing was changed" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if kind in ("missing", "unexpected"):
        found = offload.load_weights(model, tmp_path, strict=False)
        plain = t.Stack()
        expected = plain.load_state_dict(state, strict=False)
        assert sorted(found.missing_keys) == sorted(expected.missing_keys)
        assert found.unexpected_keys == expected.unexpected_keys
        assert torch.equal(model.state_dict()["head.weight"], state["head.weight"])
    else:
        with pytest.raises(offload.CheckpointError, match=message):
            offload.load_weights(model, tmp_path, strict=False)


def header(entries: Any, more: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + more


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (b"\x04" + b"\0" * 7 + b"nope", "not JSON"),
        (header([1]), "not a JSON object"),
        (header({"w": {"dtype": "F32"}}), "no dtype, shape and data_offsets of w"),
        (header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "truncated"),
        (
            header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, b"0" * 16),
            "damaged",
        ),
        (
            header({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, b"0" * 16),
            "damaged",
        ),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(offload.CheckpointError, match=message) as caught:
        offload.load_weights(nn.Linear(2, 2), file)
    assert str(file) in str(caught.value)


def test_a_dtype_that_torch_has_not_matters_only_where_it_is_wanted(tmp_path: Path) -> None:
    entries = {
        "weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "scale": {"dtype": "F4", "shape": [8], "data_offsets": [4, 8]},
    }
    file = tmp_path / "w.safetensors"
    file.write_bytes(header(entries, b"\0" * 8))
    linear = nn.Linear(1, 1, bias=False)
    found = offload.load_weights(linear, file, strict=False)
    assert found.unexpected_keys == ["scale"]
    assert linear.weight.item() == 0
    linear.register_buffer("scale", torch.zeros(8))
    with pytest.raises(offload.CheckpointError, match="scale is F4"):
        offload.load_weights(linear, file)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}}, "no weight_map"),
        ({"weight_map": {"weight": "../x.safetensors"}}, "not the name of a file beside it"),
        ({"weight_map": {"weight": "a.safetensors"}}, "said to be in a.safetensors"),
        ({"weight_map": {"weight": "b.safetensors"}}, "No such file"),
    ],
)
def test_a_wrong_index_is_refused(index: Any, message: str, tmp_path: Path) -> None:
    save_file({"other": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(offload.CheckpointError, match=message):
        offload.load_weights(nn.Linear(2, 2), tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(offload.CheckpointError, match=r"expected a \.safetensors file"):
        offload.load_weights(nn.Linear(2, 2), tmp_path / "nothing")


def test_a_graph_from_before_is_not_differentiated_with_other_weights(tmp_path: Path) -> None:
    saved(tmp_path / "model.safetensors", source())
    for make in (t.Stack, lambda: t.wrapped(t.Stack, tmp_path, BUDGET)):
        model = make()
        loss = model(TOKENS).sum()
        offload.load_weights(model, tmp_path)
        with pytest.raises(RuntimeError, match="modified by an"):
            loss.backward()


def test_tensors_that_the_cpu_cannot_write_to_are_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device: "meta" stands for one; what would be copied there is noted."""
    values = torch.arange(5000.0)
    save_file({"values": values}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["values"]
    parts: list[torch.Tensor] = []
    monkeypatch.setattr("offload.checkpoint.safetensors_file._STAGING_BYTES", 4096)
    with NotingCopies(parts):
        stored.read_into(torch.empty(5000, device="meta"))
    assert len(parts) == 5
    assert torch.equal(torch.cat(parts), values)


class NotingCopies(TorchDispatchMode):
    """Notes what is copied to tensors on "meta"."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta:
            self.parts.append(args[1].clone())
        return func(*args, **(kwargs or {}))
