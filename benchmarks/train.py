"""The demo against plain PyTorch: step time, peak memory, and whether the losses are the same bits.

Runs examples/train_gpt.py in processes of their own, alternating: offloaded under a cap on its
memory, then plain without a cap and with torch's fastest update, fused AdamW. Both cut their steps
into the same micro-batches. One more plain run with the for-loop AdamW, whose bits offload.AdamW
reproduces, gives the losses to compare with.

    python benchmarks/train.py                # 124M parameters under 1 GiB, about 10 minutes
    python benchmarks/train.py --model 350m   # under 2 GiB
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Bar, add_common_options, finish, print_rows, raw_disk_rate

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_gpt.py"
CAPS = {"tiny": "512MiB", "124m": "1GiB", "350m": "2GiB"}
STEP_RATIO = 1.25
OPTIMIZER_SHARE = 0.01
"""Of a step's time, inside optimizer.step(): the update runs later, under the next forward."""
TRAFFIC_ERROR = 0.02
"""Of the bytes that a step moves, against what Report.step_traffic says it will."""


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces the model and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--model", choices=tuple(CAPS), default="124m")
    add("--memory", metavar="SIZE", help="cap of the offloaded runs (default: by model)")
    add("--alternations", type=int, default=3)
    add("--steps", type=int, default=6, help="per run")
    add("--drop", type=int, default=2, help="first steps of each run that are not timed")
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    add("--threads", type=int)
    options = parser.parse_args()
    if options.quick:
        options.model, options.alternations, options.steps = "tiny", 1, 8
    if options.memory is None:
        options.memory = CAPS[options.model]
    if options.alternations < 1 or not 0 <= options.drop < options.steps:
        parser.error("--alternations must be at least 1, and --drop less than --steps")
    return options


def run_script(options: argparse.Namespace, *how: str) -> dict[str, Any]:
    """One run of the example in a process of its own; what it wrote as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(SCRIPT), "--model", options.model, "--json", str(result)]
        command += ["--steps", str(options.steps), "--save-final-hash", *how]
        if options.threads is not None:
            command += ["--threads", str(options.threads)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\nended with {run.returncode}:\n{run.stderr}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def row_of(name: str, run: dict[str, Any], drop: int) -> dict[str, Any]:
    """One line of the table: a run without its first `drop` steps."""
    timed = run["step_seconds"][drop:]
    return {
        "run": name,
        "step_s": statistics.median(timed),
        "min_s": min(timed),
        "max_s": max(timed),
        "peak_rss_mib": run["peak_rss_bytes"] / 2**20,
        "read_mb_per_step": statistics.median(run["step_read_bytes"][drop:]) / 1e6,
        "write_mb_per_step": statistics.median(run["step_write_bytes"][drop:]) / 1e6,
        "stall_pct": 100 * run["stall_fraction"],
        "disk_mb_per_s": None,
    }


def optimizer_share(runs: list[dict[str, Any]], drop: int) -> float:
    """The share of the steps' time that was spent inside optimizer.step()."""
    stepping: float = sum(s for run in runs for s in run["optimizer_seconds"][drop:])
    total: float = sum(s for run in runs for s in run["step_seconds"][drop:])
    return stepping / total


def traffic_error(runs: list[dict[str, Any]], drop: int, what: str) -> float:
    """How far the bytes of the median step, read or written, are from those foreseen; 0 to 1."""
    moved: float = statistics.median(b for run in runs for b in run[f"step_{what}_bytes"][drop:])
    foreseen: float = statistics.median(run[f"foreseen_{what}_bytes"] for run in runs)
    return abs(moved - foreseen) / foreseen if foreseen else float(moved > 0)


def main() -> int:
    """Returns 1 if a bar fails."""
    options = parse_arguments()
    offloaded: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    rates: list[float] = []
    how = ["--memory", options.memory, "--swap-dir", options.swap_dir]
    if options.model == "tiny":  # its cap is mostly torch itself and would leave nothing to spill
        how += ["--host-budget", "16MiB"]
    for number in range(1, options.alternations + 1):
        offloaded.append(run_script(options, *how))
        rows.append(row_of(f"offload {number}", offloaded[-1], options.drop))
        read, write = rows[-1]["read_mb_per_step"], rows[-1]["write_mb_per_step"]
        if read + write > 0:
            size = (64 if options.quick else 1024) * 2**20
            rates.append(raw_disk_rate(options.swap_dir, read / (read + write), size))
            rows[-1]["disk_mb_per_s"] = rates[-1] / 1e6
        plain.append(run_script(options, "--no-offload", "--no-cap", "--fused"))
        rows.append(row_of(f"plain, fused {number}", plain[-1], options.drop))
        print(f"alternation {number} of {options.alternations} done", flush=True)
    exact = run_script(options, "--no-offload", "--no-cap")
    rows.append(row_of("plain, for-loop", exact, options.drop))
    print_rows(f"{options.model} under {options.memory}", rows)

    step, compute = (
        statistics.median(s for run in runs for s in run["step_seconds"][options.drop :])
        for runs in (offloaded, plain)
    )
    moved = 1e6 * statistics.median(
        row["read_mb_per_step"] + row["write_mb_per_step"]
        for row in rows
        if row["run"].startswith("offload")
    )
    disk = moved / statistics.median(rates) if rates else 0.0
    limit = max(compute, disk)
    summary = {
        "run": "limit",
        "plain_step_s": compute,
        "disk_alone_s": disk,
        "limit_s": limit,
        "offload_step_s": step,
        "limit_reached": limit / step,
        "step_ratio": step / compute,
    }
    print_rows(
        "the step cannot be shorter than the slower of plain compute and the disk", [summary]
    )

    different = sum(
        a != b for run in offloaded for a, b in zip(run["losses"], exact["losses"], strict=True)
    )
    changed = sum(run["weights_sha256"] != exact["weights_sha256"] for run in offloaded)
    peak = max(run["peak_rss_bytes"] for run in offloaded)
    bars = [
        Bar("peak RSS, bytes", peak, offloaded[0]["memory_cap_bytes"]),
        Bar("losses that differ from plain", different, 0),
        Bar("runs whose final weights differ from plain", changed, 0),
    ]
    if not options.quick:  # a tiny model's step is all overhead
        bars.insert(0, Bar("step time, offload / plain", step / compute, STEP_RATIO))
        share = optimizer_share(offloaded, options.drop)
        bars.append(Bar("share of the step inside optimizer.step()", share, OPTIMIZER_SHARE))
        for what, name in (("read", "read"), ("write", "written")):
            error = traffic_error(offloaded, options.drop, what)
            bars.append(Bar(f"bytes {name} per step, off what is foreseen", error, TRAFFIC_ERROR))
    return finish(options, options.swap_dir, [*rows, summary], bars)


if __name__ == "__main__":
    sys.exit(main())
