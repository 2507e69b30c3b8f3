"""benchmarks/gpu.py: its control flow, on the simulated device; what needs a GPU says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import limit_rows, stall_rows, training_bars  # noqa: E402
from gpu_peers.llama import Llama, LlamaConfig  # noqa: E402

Quick = Callable[..., dict[str, Any]]


def test_quick_run_on_the_simulated_device(quick: Quick, tmp_path: Path) -> None:
    folder = tmp_path / "swap"
    folder.mkdir()
    result = quick("gpu.py", "--device", "simulated", "--swap-dir", str(folder))
    rows = result["rows"]
    transfers = [row for row in rows if "direction" in row]
    assert [row["direction"] for row in transfers] == ["h2d"] * 5 + ["d2h"] * 5
    for row in transfers:
        assert row["ratio"] == pytest.approx(row["offload_gb_per_s"] / row["pinned_gb_per_s"])
    trained = {row["contestant"]: row for row in rows if "contestant" in row}
    assert list(trained) == ["offload", "plain"]
    assert trained["offload"]["to_device_bytes"] > 0
    assert trained["offload"]["to_host_bytes"] > 0
    # Updates of bf16 parameters differ (masters, and moments rounded at random), hardly at all.
    assert trained["offload"]["loss"] == pytest.approx(trained["plain"]["loss"], rel=1e-2)
    limit = next(row for row in rows if "limit_s" in row)
    assert limit["limit_s"] == max(limit["compute_s"], limit["h2d_s"], limit["d2h_s"])
    assert limit["fraction"] == pytest.approx(limit["limit_s"] / trained["offload"]["step_s"])
    assert list(folder.iterdir()) == []


def test_stalls_are_means_over_the_steps() -> None:
    rows = stall_rows(
        {"steps": [{"stalls": {"params": 0.5, "room": 0.1}}, {"stalls": {"room": 0.3}}]}
    )
    found = {row["waited_for"]: row["s_per_step"] for row in rows}
    assert found == {"params": pytest.approx(0.25), "room": pytest.approx(0.2)}


def test_peers_that_need_cuda_say_so() -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick", "--device", "simulated"),
            *("--only", "training", "--without", "offload", "--without", "plain"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for name in ("fsdp2", "torchao"):
        assert f"{name}: needs CUDA: left out" in done.stdout


def test_the_model_has_the_parameters_of_llama_7b() -> None:
    assert LlamaConfig().params == 6_738_415_616
    config = LlamaConfig(vocabulary=32, width=16, hidden=24, layers=2, heads=2)
    model = Llama(config, 8)
    assert sum(p.numel() for p in model.parameters()) == config.params


def test_the_model_computes_what_transformers_does() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = LlamaConfig(vocabulary=50, width=32, hidden=48, layers=2, heads=4)
    ours = Llama(config, 9)
    theirs = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            rms_norm_eps=1e-6,
        )
    )
    names = {
        "embed": "model.embed_tokens",
        "layers": "model.layers",
        "attention": "self_attn",
        "input_norm": "input_layernorm",
        "post_norm": "post_attention_layernorm",
        "norm": "model.norm",
        "head": "lm_head",
    }
    values = {}
    for name, value in ours.state_dict().items():
        parts = [names.get(part, part) for part in name.split(".")]
        if parts[-2] in ("gate_proj", "up_proj", "down_proj"):
            parts.insert(-2, "mlp")
        values[".".join(parts)] = value
    theirs.load_state_dict(values)
    tokens = torch.randint(50, (2, 10))
    expected = theirs(input_ids=tokens, labels=tokens).loss
    assert ours(tokens).item() == pytest.approx(expected.item(), rel=1e-5)


def test_limit_and_bars() -> None:
    row = {"to_device_bytes": 30.0, "to_host_bytes": 5.0, "step_s": 4.0}
    speed = {"offload": 25.0, "plain": 50.0, "fsdp2": 10.0}
    (limit,) = limit_rows([row], speed, {"h2d": 10.0, "d2h": 10.0}, 100)
    assert limit == {"compute_s": 2.0, "h2d_s": 3.0, "d2h_s": 0.5, "limit_s": 3.0, "fraction": 0.75}
    assert limit_rows([row], {"offload": 1.0}, {}, 100) == []
    assert [bar.holds for bar in training_bars(speed)] == [False, True]
    assert training_bars({"plain": 1.0}) == []
