"""Everyone's AdamW with its state in memory, against the memory's bandwidth.

Where a process's memory lies decides a good deal: in a virtual machine some of it is reached by a
short walk through the page tables and some by a long one, which makes the same update up to 40%
slower for as long as the process lives. So each round starts everyone anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import Bar, in_turn, print_rows
from worker import Json, Worker

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


@dataclass(kw_only=True)
class _Entrant(Contestant):
    """A contestant of one round."""

    worker: Worker


def compare(field: Field) -> tuple[list[dict[str, Any]], list[Bar]]:
    """(rows: one per round, then one per contestant; bars)."""
    if field.deepspeed is not None:
        print("deepspeed: loading cpu_adam; the first time compiles it", flush=True)
    ours, peers, limits = _start(field)
    _take_a_turn([*ours, *peers, *limits], 0)
    for number in range(1, field.options.rounds):
        again = _start(field)
        _take_a_turn([c for group in again for c in group], number)
        for group, more in zip((ours, peers, limits), again, strict=True):
            for contestant, other in zip(group, more, strict=True):
                contestant.found += other.found
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


def _start(field: Field) -> tuple[list[_Entrant], list[_Entrant], list[_Entrant]]:
    """(offload's, one per format; its peers; the limit, one per format), in new processes."""

    def enter(name: str, settings: Json, request: Json, **how: Any) -> _Entrant:
        module = "in_memory" if settings else "bandwidth"
        worker = field.start(module, settings, **how)
        return _Entrant(name, median_steps(worker, request), worker=worker)

    ours = [
        enter(
            f"offload {form.name}",
            {"optimizer": "offload", "options": {"state_format": form.name}},
            {},
        )
        for form in FORMATS
    ]
    peers = [enter("torch fused", {"optimizer": "torch", "options": {"fused": True}}, {})]
    if field.deepspeed is not None:
        python, env = field.deepspeed
        peers.append(
            enter(
                "deepspeed",
                {"optimizer": "deepspeed", "options": {}},
                {},
                python=python,
                env={**env, "DS_ACCELERATOR": "cpu"},
            )
        )
    limits = [
        enter(f"limit {f.name}", {}, {"state_bytes": f.state_bytes}, env=HUGE_PAGES)
        for f in FORMATS
    ]
    return ours, peers, limits


def _take_a_turn(entrants: Sequence[_Entrant], number: int) -> None:
    """Has everyone measured once, in the order of round `number`, and ends them."""
    take_turns(in_turn(entrants, number), 1)
    for entrant in entrants:
        entrant.worker.close()


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
