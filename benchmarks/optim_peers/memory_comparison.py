"""Everyone's AdamW with its state in memory, against the memory's bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import Bar, print_rows

from optim_peers.bandwidth import HUGE_PAGES
from optim_peers.field import (
    SKIPPED,
    Contestant,
    Field,
    median_steps,
    ratio_bar,
    rows_of_rounds,
    take_turns,
)

SCALE_BYTES = 4 / 256


@dataclass(frozen=True)
class StateFormat:
    """How offload.AdamW keeps its two moments, and what it must reach."""

    name: str
    moment_bytes: float
    least_of_fused: float

    @property
    def state_bytes(self) -> float:
        """Of both moments of a parameter."""
        return 2 * self.moment_bytes

    @property
    def moved_bytes(self) -> float:
        """Of a parameter's update: it and its state read and written, its gradient read."""
        return 2 * (4 + self.state_bytes) + 4


FORMATS = (
    StateFormat("float32", 4, 1.0),
    StateFormat("bfloat16", 2, 1.5),
    StateFormat("int8", 1 + SCALE_BYTES, 2.0),
)


def compare(field: Field) -> tuple[list[dict[str, Any]], list[Bar]]:
    """(rows: one per round, then one per contestant; bars)."""
    ours, peers = _start(field)
    memory = field.start("bandwidth", {}, env=HUGE_PAGES)
    limits = [
        Contestant(f"limit {f.name}", median_steps(memory, {"state_bytes": f.state_bytes}))
        for f in FORMATS
    ]
    take_turns([*ours, *peers, *limits], field.options.rounds)
    rounds = rows_of_rounds("memory", [*ours, *peers, *limits])
    summaries = [
        _summary(field, contestant, form, limit)
        for contestant, form, limit in [
            *zip(ours, FORMATS, limits, strict=True),
            *((peer, FORMATS[0], limits[0]) for peer in peers),
        ]
    ]
    if field.deepspeed is None:
        summaries.append({"comparison": "memory", "run": "deepspeed", "settings": SKIPPED})
    print_rows(
        f"state in memory, {field.numel / 1e6:.1f}M parameters, {field.options.threads} "
        f"threads, medians of {field.options.rounds}",
        summaries,
    )
    bars = []
    for contestant, form in zip(ours, FORMATS, strict=True):
        for peer in peers:
            target = form.least_of_fused if peer.name == "torch fused" else 1.0
            if peer.name == "torch fused" or form is FORMATS[0]:
                name = f"in memory, {peer.name} / {contestant.name}"
                bars.append(ratio_bar(name, peer.seconds, contestant.seconds, target, True))
    return [*rounds, *summaries], bars


def _start(field: Field) -> tuple[list[Contestant], list[Contestant]]:
    ours = []
    for form in FORMATS:
        options = {"state_format": form.name}
        worker = field.start("in_memory", {"optimizer": "offload", "options": options})
        ours.append(Contestant(f"offload {form.name}", median_steps(worker, {})))
    fused = field.start("in_memory", {"optimizer": "torch", "options": {"fused": True}})
    peers = [Contestant("torch fused", median_steps(fused, {}))]
    if field.deepspeed is not None:
        python, env = field.deepspeed
        print("deepspeed: loading cpu_adam; the first time compiles it", flush=True)
        settings = {"optimizer": "deepspeed", "options": {}}
        worker = field.start("in_memory", settings, python, {**env, "DS_ACCELERATOR": "cpu"})
        peers.append(Contestant("deepspeed", median_steps(worker, {})))
    return ours, peers


def _summary(
    field: Field, contestant: Contestant, form: StateFormat, limit: Contestant
) -> dict[str, Any]:
    seconds = contestant.median()
    return {
        "comparison": "memory",
        "run": contestant.name,
        "settings": f"{field.options.threads} threads",
        "ms": seconds * 1e3,
        "min_ms": min(contestant.seconds) * 1e3,
        "max_ms": max(contestant.seconds) * 1e3,
        "bytes_per_param": form.moved_bytes,
        "gb_per_s": form.moved_bytes * field.numel / seconds / 1e9,
        "limit_ms": limit.median() * 1e3,
        "limit_reached": limit.median() / seconds,
    }
