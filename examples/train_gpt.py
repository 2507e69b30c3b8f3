"""Trains a GPT whose training state is larger than the memory it is allowed.

    python examples/train_gpt.py                        # 124M parameters, 1.9 GB of state, in 1 GiB
    python examples/train_gpt.py --no-offload           # the same, plainly: out of memory
    python examples/train_gpt.py --no-offload --no-cap  # plainly, uncapped: the very same losses

Two lines differ between offloaded and plain training: `offload.wrap` and the optimizer's name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import StepProgress, print_summary, print_table
from memory_cap import (
    MemoryPlan,
    derive_host_budget,
    format_size,
    keep_freed_memory,
    memory_use,
    parse_size,
    set_memory_cap,
)

# torch, and what imports it, is imported after the cap is set: see main().
if TYPE_CHECKING:
    import torch
    from gpt import GPTConfig
    from text_data import TextData

MODELS = ("124m", "350m", "tiny")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked for what can be checked without torch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="text file or folder (default: Python's own sources)")
    add("--memory", metavar="SIZE", default="1GiB", help="cap on the process, or 'none' (1GiB)")
    add("--no-cap", action="store_true", help="the same as --memory none")
    add("--no-offload", action="store_true", help="train plainly, with torch.optim.AdamW")
    add("--fused", action="store_true", help="with --no-offload: torch's fused AdamW, its fastest")
    add("--host-budget", metavar="SIZE", help="offload's arena (default: what the cap leaves)")
    add("--swap-dir", metavar="PATH", help="folder for unnamed swap files (default: system's temp)")
    add("--model", choices=MODELS, default="124m")
    add("--checkpoint", action="store_true", help="recompute each block in backward")
    add("--steps", type=int, default=10)
    add("--tokens-per-step", type=int, default=2048)
    add("--micro-batch-tokens", type=int, default=256)
    add("--sequence", type=int, help="tokens in a window (default: 256, or what the model takes)")
    add("--lr", type=float, default=1.5e-4)
    add("--warmup", type=int, default=4, help="steps of linear warm-up, before the cosine")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--weight-decay", type=float, default=0.1, help="of matrices; norms and biases have none")
    add("--seed", type=int, default=1)
    add("--threads", type=int, help="torch's compute threads (default: torch's)")
    add("--json", metavar="FILE", help="write the results here")
    add("--save-final-hash", action="store_true", help="SHA-256 of the final weights in the JSON")
    options = parser.parse_args(arguments)

    for name in ("steps", "tokens_per_step", "micro_batch_tokens", "sequence", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    try:
        no_cap = options.no_cap or options.memory.lower() == "none"
        options.cap = None if no_cap else parse_size(options.memory)
        options.budget = None if options.host_budget is None else parse_size(options.host_budget)
    except ValueError as error:
        parser.error(str(error))
    if options.fused and not options.no_offload:
        parser.error("--fused needs --no-offload: offload.AdamW has its own kernel")
    if not options.no_offload and options.cap is None and options.budget is None:
        parser.error("without a cap, say how much memory offload may use: --host-budget SIZE")
    if options.tokens_per_step % options.micro_batch_tokens != 0:
        parser.error("--tokens-per-step must be a multiple of --micro-batch-tokens")
    return options


@dataclass
class Job:
    """What is trained, and how its steps are cut."""

    options: argparse.Namespace
    config: GPTConfig
    data: TextData
    sequence: int

    @property
    def batch(self) -> int:
        """Windows in a micro-batch."""
        return int(self.options.micro_batch_tokens) // self.sequence

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return int(self.options.tokens_per_step // self.options.micro_batch_tokens)


@dataclass
class Record:
    """What a run measured; one entry per step in each list.

    Attributes:
        optimizer_seconds: inside ``optimizer.step()``.
        foreseen_read, foreseen_write: bytes of a step, as offload foresees them after the last one.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    write_bytes: list[int] = field(default_factory=list)
    stall_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    foreseen_read: int = 0
    foreseen_write: int = 0


@dataclass(frozen=True)
class DiskUse:
    """offload's counters since the model was wrapped; zeros when training plainly."""

    read: int = 0
    write: int = 0
    stall: float = 0.0


def disk_use(model: torch.nn.Module, plain: bool) -> DiskUse:
    """Reads the counters of a wrapped model."""
    if plain:
        return DiskUse()
    import offload

    counters = offload.report(model).as_dict()
    return DiskUse(
        read=int(counters["disk_read_bytes"]),
        write=int(counters["disk_write_bytes"]),
        stall=float(counters["stall_seconds"]),
    )


def default_swap_dir() -> str:
    """The system's folder for temporary files; the current folder if that one lies in memory.

    Swap files have no name, so nothing is created that would have to be removed.
    """
    folder = os.path.realpath(tempfile.gettempdir())
    kind, longest = "", -1
    with Path("/proc/mounts").open(encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, point, filesystem, *_ = line.split()
            below = folder == point or folder.startswith(point.rstrip("/") + "/")
            if below and len(point) >= longest:
                kind, longest = filesystem, len(point)
    return str(Path.cwd()) if kind in ("tmpfs", "ramfs") else folder


def plan_memory(job: Job) -> tuple[MemoryPlan | None, float]:
    """Measures one micro-batch, prints what a step costs, and divides the cap if there is one.

    Returns that division, and the seconds that a step's forward and backward will take.
    """
    import torch
    from gpt import GPT, measure_micro_batch

    options = job.options
    cost = measure_micro_batch(job.config, job.batch, job.sequence)
    use = memory_use()
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(job.config).parameters())
    seconds = cost.seconds * job.micro_batches
    print_table(
        f"GPT {options.model}: {params / 1e6:.1f}M parameters, {job.config.layers} layers",
        [
            ("text", f"{job.data.size / 1e6:.1f} MB in {job.data.file_count} files"),
            ("training state, fp32", format_size(16 * params)),
            ("  parameters", format_size(4 * params)),
            ("  gradients", format_size(4 * params)),
            ("  AdamW's two moments", format_size(8 * params)),
            ("tokens per step", f"{job.micro_batches} x {options.micro_batch_tokens}"),
            ("forward + backward per step", f"about {seconds:.1f} s"),
        ],
    )
    if options.cap is None:
        return None, seconds
    baseline = max(use.rss, use.data)
    plan = derive_host_budget(options.cap, baseline, cost.activation_bytes, cost.working_bytes)
    if options.no_offload:
        need = baseline + cost.activation_bytes + 16 * params
        verdict = "will run out of memory" if need > options.cap else "should fit"
        print(
            f"plain training needs about {format_size(need)}; under the cap of "
            f"{format_size(options.cap)} it {verdict}"
        )
    else:
        rows = [(what, format_size(size)) for what, size in plan.rows()]
        print_table(f"memory cap: {format_size(plan.cap)}", rows)
    return plan, seconds


def prepare(
    job: Job, plan: MemoryPlan | None, compute_seconds: float
) -> tuple[torch.nn.Module, torch.optim.Optimizer, int]:
    """Builds the model and its optimizer. Returns them with the number of parameters."""
    import torch
    from gpt import GPT, parameter_groups

    options = job.options
    torch.manual_seed(options.seed)
    model: torch.nn.Module = GPT(job.config)
    params = sum(p.numel() for p in model.parameters())
    settings: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "eps": 1e-8}
    if options.no_offload:
        groups = parameter_groups(model, options.weight_decay)
        plain = torch.optim.AdamW(groups, foreach=False, fused=options.fused, **settings)
        return model, plain, params

    import offload

    budget = options.budget
    if budget is None and plan is not None:
        budget = plan.arena
        if budget <= 0:
            raise SystemExit(
                f"error: a cap of {format_size(plan.cap)} leaves nothing for offload; raise "
                "--memory, lower --micro-batch-tokens or add --checkpoint"
            )
    swap_dir = options.swap_dir or default_swap_dir()
    print(f"swap files (unnamed): {swap_dir}")
    policy = offload.Policy(device="cpu", budget=offload.Budget(host=budget), swap_dir=swap_dir)
    try:
        model = offload.wrap(model, policy)
    except offload.OffloadError as error:
        raise SystemExit(f"error: {error}") from error
    optimizer = offload.AdamW(parameter_groups(model, options.weight_decay), **settings)
    report = offload.report(model)
    print(report)
    traffic = report.step_traffic(job.micro_batches)
    expected = report.expected_step_seconds(compute_seconds, job.micro_batches)
    print_table(
        f"expected step: {expected:.1f} s",
        [
            ("compute", f"{compute_seconds:.1f} s"),
            ("read from disk", format_size(traffic.read)),
            ("written to disk", format_size(traffic.written)),
            ("disk, as measured", f"{report.as_dict()['disk_read_rate'] / 1e6:.0f} MB/s"),
        ],
    )
    return model, optimizer, params


def train(
    job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, record: Record
) -> None:
    """An ordinary training loop; `record` grows by one entry per finished step."""
    import torch
    from gpt import learning_rate_factor, loss_of

    options = job.options
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.warmup, options.steps)
    )
    disk = disk_use(model, options.no_offload)
    with StepProgress(options.steps) as progress:
        for step in range(options.steps):
            started = time.perf_counter()
            total = 0.0
            for micro_batch in range(job.micro_batches):
                windows = job.data.windows(step, micro_batch, job.batch, job.sequence + 1)
                loss = loss_of(model, windows) / job.micro_batches
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
            if options.clip > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            stepping = time.perf_counter()
            optimizer.step()
            stepped = time.perf_counter() - stepping
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - started
            previous, disk = disk, disk_use(model, options.no_offload)
            record.losses.append(total)
            record.step_seconds.append(seconds)
            record.optimizer_seconds.append(stepped)
            record.rss_bytes.append(memory_use().rss)
            record.read_bytes.append(disk.read - previous.read)
            record.write_bytes.append(disk.write - previous.write)
            record.stall_seconds.append(disk.stall - previous.stall)
            facts = f"loss {total:.6f}  {options.tokens_per_step / seconds:.0f} tokens/s"
            if not options.no_offload:
                facts += (
                    f"  read {record.read_bytes[-1] / seconds / 1e6:.0f} MB/s"
                    f"  write {record.write_bytes[-1] / seconds / 1e6:.0f} MB/s"
                    f"  stall {100 * record.stall_seconds[-1] / seconds:.1f} %"
                )
            progress.show(step + 1, facts)
    if not options.no_offload:
        import offload

        traffic = offload.report(model).step_traffic(job.micro_batches)
        record.foreseen_read, record.foreseen_write = traffic.read, traffic.written


def results(job: Job, params: int, record: Record) -> dict[str, Any]:
    """The JSON: sizes in bytes, times in seconds, losses in full precision."""
    import torch

    seconds = record.step_seconds
    median = statistics.median(seconds) if seconds else 0.0
    return {
        "model": job.options.model,
        "offload": not job.options.no_offload,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": job.options.seed,
        "tokens_per_step": job.options.tokens_per_step,
        "micro_batch_tokens": job.options.micro_batch_tokens,
        "params": params,
        "state_bytes": 16 * params,
        "memory_cap_bytes": job.options.cap,
        "peak_rss_bytes": memory_use().peak_rss,
        "steps": len(seconds),
        "first_loss": record.losses[0] if record.losses else None,
        "last_loss": record.losses[-1] if record.losses else None,
        "losses": record.losses,
        "tokens_per_s": job.options.tokens_per_step / median if median else 0.0,
        "step_seconds": seconds,
        "optimizer_seconds": record.optimizer_seconds,
        "rss_bytes": record.rss_bytes,
        "disk_read_bytes": sum(record.read_bytes),
        "disk_write_bytes": sum(record.write_bytes),
        "step_read_bytes": record.read_bytes,
        "step_write_bytes": record.write_bytes,
        "foreseen_read_bytes": record.foreseen_read,
        "foreseen_write_bytes": record.foreseen_write,
        "stall_fraction": sum(record.stall_seconds) / sum(seconds) if seconds else 0.0,
    }


def make_job(options: argparse.Namespace) -> Job:
    """Opens the data and checks it, and the sizes, against the model."""
    from gpt import PRESETS
    from text_data import DataError, open_data

    config = replace(PRESETS[options.model], checkpoint=options.checkpoint)
    sequence = options.sequence or min(256, config.context, options.micro_batch_tokens)
    if sequence > config.context:
        raise SystemExit(f"error: --sequence {sequence}, but the model takes {config.context}")
    if options.micro_batch_tokens % sequence != 0:
        raise SystemExit(f"error: --micro-batch-tokens must be a multiple of {sequence} (sequence)")
    try:
        data = open_data(options.data, options.seed)
        data.windows(0, 0, 1, sequence + 1)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    return Job(options=options, config=config, data=data, sequence=sequence)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 130 after Ctrl-C. Running out of memory is left to raise."""
    options = parse_arguments(arguments)
    if options.cap is not None:
        set_memory_cap(options.cap)
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    job = make_job(options)
    record = Record()
    params = 0
    code = 0
    try:
        plan, compute_seconds = plan_memory(job)
        model, optimizer, params = prepare(job, plan, compute_seconds)
        if options.cap is not None:
            keep_freed_memory()
        train(job, model, optimizer, record)
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        code = 130
    found = results(job, params, record)
    if options.save_final_hash and code == 0:
        from gpt import hash_weights

        found["weights_sha256"] = hash_weights(model)
        found["peak_rss_bytes"] = memory_use().peak_rss
    print_summary(found)
    if options.json is not None:
        with Path(options.json).open("w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return code


if __name__ == "__main__":
    sys.exit(main())
