from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "train_gpt.py"
TINY = ["--model", "tiny", "--tokens-per-step", "256", "--micro-batch-tokens", "64"]
PLAIN = ["--no-offload", "--no-cap"]
FIELDS = {
    "params",
    "state_bytes",
    "memory_cap_bytes",
    "peak_rss_bytes",
    "steps",
    "first_loss",
    "last_loss",
    "losses",
    "tokens_per_s",
    "step_seconds",
    "optimizer_seconds",
    "foreseen_read_bytes",
    "foreseen_write_bytes",
    "rss_bytes",
    "disk_read_bytes",
    "disk_write_bytes",
    "stall_fraction",
    "model",
    "threads",
    "torch",
    "weights_sha256",
}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300
    )


def train(folder: Path, text: Path, *arguments: str) -> dict[str, Any]:
    result = folder / "result.json"
    run = run_script(
        *TINY, "--data", str(text), "--save-final-hash", "--json", str(result), *arguments
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_plain_training_writes_every_field_and_repeats_bit_for_bit(
    tmp_path: Path, text_file: Path
) -> None:
    found = train(tmp_path, text_file, *PLAIN, "--steps", "6")
    assert set(found) >= FIELDS
    assert found["steps"] == len(found["losses"]) == len(found["step_seconds"]) == 6
    assert found["state_bytes"] == 16 * found["params"]
    assert found["memory_cap_bytes"] is None
    assert found["first_loss"] == found["losses"][0]
    assert found["last_loss"] == found["losses"][-1] < found["first_loss"]
    assert found["disk_read_bytes"] == found["disk_write_bytes"] == 0
    again = train(tmp_path, text_file, *PLAIN, "--steps", "6")
    assert again["losses"] == found["losses"]
    assert again["weights_sha256"] == found["weights_sha256"]
    other = train(tmp_path, text_file, *PLAIN, "--steps", "6", "--seed", "2")
    assert other["losses"] != found["losses"]
    assert other["weights_sha256"] != found["weights_sha256"]


@pytest.mark.parametrize("extra", [[], ["--checkpoint"]])
def test_offloaded_training_equals_plain_training_bit_for_bit(
    tmp_path: Path, text_file: Path, extra: list[str]
) -> None:
    plain = train(tmp_path, text_file, *PLAIN, "--steps", "20", *extra)
    # A third of the 37 MiB of state, so that most of it must live on disk.
    offloaded = train(
        tmp_path,
        text_file,
        *("--no-cap", "--host-budget", "18MiB", "--swap-dir", str(tmp_path), "--steps", "20"),
        *extra,
    )
    assert offloaded["disk_read_bytes"] > 0
    assert offloaded["disk_write_bytes"] > 0
    assert offloaded["losses"] == plain["losses"]
    assert offloaded["weights_sha256"] == plain["weights_sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "text.txt"]


def test_offloaded_training_stays_under_its_cap(tmp_path: Path, text_file: Path) -> None:
    found = train(
        tmp_path, text_file, "--memory", "512MiB", "--swap-dir", str(tmp_path), "--steps", "3"
    )
    assert found["memory_cap_bytes"] == 512 * 2**20
    assert found["peak_rss_bytes"] <= found["memory_cap_bytes"]


def test_plain_training_runs_out_of_memory_under_the_cap(text_file: Path) -> None:
    run = run_script(
        *("--no-offload", "--memory", "640MiB", "--model", "124m", "--steps", "1"),
        *("--data", str(text_file), "--micro-batch-tokens", "64", "--tokens-per-step", "64"),
    )
    assert run.returncode == 1
    assert "it will run out of memory" in run.stdout
    assert "RuntimeError" in run.stderr
    assert "DefaultCPUAllocator: can't allocate memory" in run.stderr


@pytest.mark.parametrize("offloaded", [False, True])
def test_interrupt_prints_the_summary_so_far(
    tmp_path: Path, text_file: Path, offloaded: bool
) -> None:
    how = (
        ["--no-cap", "--host-budget", "18MiB", "--swap-dir", str(tmp_path)] if offloaded else PLAIN
    )
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *TINY, *how, "--data", str(text_file), "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in out
    assert "summary" in out
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "'lots' is not a size"),
        (["--no-cap"], "say how much memory offload may use"),
        (["--tokens-per-step", "100"], "must be a multiple of --micro-batch-tokens"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--fused"], "--fused needs --no-offload"),
        ([*PLAIN, "--data", "/nowhere"], "/nowhere: no such file or folder"),
        ([*PLAIN, "--sequence", "4096"], "--sequence 4096, but the model takes 1024"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(arguments: list[str], message: str) -> None:
    run = run_script(*arguments)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
