"""offload.AdamW with its state on disk, against the disk, a mapped file and DeepSpeed's swapper."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from collections.abc import Sequence
from typing import Any

from cgroup import MemoryCgroup, NoCgroupError, memory_cgroup
from common import Bar, print_rows
from worker import Json, Worker

from optim_peers.engine import MIB, SETTINGS, described
from optim_peers.field import (
    SKIPPED,
    Contestant,
    Field,
    fastest,
    median_steps,
    ratio_bar,
    rows_of_rounds,
    take_turns,
)
from optim_peers.zero_nvme import ONE_RANK

MOST_OVER_LIMIT = 1.10
LEAST_OF_PEERS = 2.0
PROCESS_BYTES = 384 * MIB
"""Of the cap, what an interpreter with torch is given beside parameters, gradients and budget."""

MAPPED_SETTINGS = [
    {"fused": fused, "sequential": sequential}
    for fused, sequential in itertools.product((True, False), (False, True))
]
ZERO_SETTINGS = [
    {"pipelined": pipelined, "sub_group_size": size, "intra_op_parallelism": threads}
    for pipelined, size, threads in (
        (True, 20_000_000, 1),
        (True, 20_000_000, 2),
        (True, 40_000_000, 1),
        (False, 20_000_000, 1),
    )
]


def compare(field: Field) -> tuple[list[dict[str, Any]], list[Bar]]:
    """(rows: one per round, then one per contestant; bars)."""
    cap = PROCESS_BYTES + 8 * field.numel + field.options.host_budget * MIB
    groups = []
    try:
        for name in ("offload", "mapped"):
            group = memory_cgroup(f"{name}-benchmark-{os.getpid()}")
            groups.append(field.enter_context(group))
            groups[-1].limit(cap)
    except NoCgroupError as error:
        print(f"no cap, and no mapped file to compare with: {error}", flush=True)
        groups = []
    ours = _streamed(field, groups)
    moved = ours.turn()
    if moved["read_bytes"] + moved["written_bytes"] == 0:
        raise SystemExit("nothing is on disk: the state fits the budget")
    limits = [_engine(field, moved), _in_memory(field)]
    peers = [*_mapped(field, groups), *_zero(field)]
    take_turns([ours, *limits, *peers], field.options.rounds)
    rounds = rows_of_rounds("disk", [ours, *limits, *peers])
    limit = [max(pair) for pair in zip(*(c.seconds for c in limits), strict=True)]
    summaries = [_summary(field, c, limit) for c in (ours, *limits, *peers)]
    names = [peer.name for peer in peers]
    if "mapped file" not in names:
        settings = "no memory cgroup: skipped"
        summaries.append({"comparison": "disk", "run": "mapped file", "settings": settings})
    if "deepspeed" not in names:
        summaries.append({"comparison": "disk", "run": "deepspeed", "settings": SKIPPED})
    print_rows(
        f"state on disk, {field.numel / 1e6:.1f}M parameters, cap {cap / MIB:.0f} MiB, "
        f"medians of {field.options.rounds}",
        summaries,
    )
    name = "on disk, offload / max(disk, update in memory)"
    bars = [ratio_bar(name, ours.seconds, limit, MOST_OVER_LIMIT, False)]
    for peer in peers:
        name = f"on disk, {peer.name} / offload"
        bars.append(ratio_bar(name, peer.seconds, ours.seconds, LEAST_OF_PEERS, True))
    return [*rounds, *summaries], bars


def _streamed(field: Field, groups: Sequence[MemoryCgroup]) -> Contestant:
    budget = field.options.host_budget * MIB
    settings = {"folder": field.folder("offload"), "host_budget": budget}
    worker = field.start("streamed", settings, before=groups[0].enter if groups else ())

    def turn() -> Json:
        found = worker.ask({})
        return found | ({"peak_bytes": groups[0].peak()} if groups else {})

    return Contestant("offload", turn, f"budget {field.options.host_budget} MiB")


def _engine(field: Field, moved: Json) -> Contestant:
    """The swap store alone; its settings are those that were fastest in trials."""
    span = max(moved["read_bytes"], moved["written_bytes"], 64 * MIB)
    worker = field.start("engine", {"folder": field.folder("engine"), "span": span})
    request = {"read": moved["read_bytes"], "written": moved["written_bytes"]}
    best = fastest(worker, [{**request, **s} for s in SETTINGS], field.options.quick)
    return Contestant("disk alone", lambda: request | worker.ask(best), described(best))


def _in_memory(field: Field) -> Contestant:
    worker = field.start("in_memory", {"optimizer": "offload", "options": {}})
    return Contestant("memory alone", median_steps(worker, {}), "offload float32")


def _mapped(field: Field, groups: Sequence[MemoryCgroup]) -> list[Contestant]:
    if not groups:
        return []
    settings = {"folder": field.folder("mapped")}
    worker = field.start("mapped", settings, before=groups[1].enter)
    best = fastest(worker, MAPPED_SETTINGS, field.options.quick)
    update = "fused" if best["fused"] else "for-loop"
    advice = ", MADV_SEQUENTIAL" if best["sequential"] else ""

    def turn() -> Json:
        return worker.ask(best) | {"peak_bytes": groups[1].peak()}

    return [Contestant("mapped file", turn, update + advice)]


def _zero(field: Field) -> list[Contestant]:
    """DeepSpeed, whose settings cannot change in a running process: each is tried in one."""
    if field.deepspeed is None:
        return []
    python, env = field.deepspeed
    print("deepspeed: loading async_io and cpu_adam; the first time compiles them", flush=True)

    def start(settings: Json) -> tuple[Worker, str]:
        folder = field.folder("deepspeed")
        with socket.socket() as free:
            free.bind((ONE_RANK["MASTER_ADDR"], 0))
            port = free.getsockname()[1]
        everything = {**settings, "folder": folder, "port": port}
        return field.start("zero_nvme", everything, python, env), folder

    tried: list[tuple[float, Json]] = []
    for settings in ZERO_SETTINGS[: 1 if field.options.quick else None]:
        worker, folder = start(settings)
        tried.append((min(worker.ask({})["seconds"] for _ in range(3)), settings))
        worker.close()
        shutil.rmtree(folder)
    best = min(tried, key=lambda trial: trial[0])[1]
    worker, _ = start(best)

    def turn() -> Json:
        found = worker.ask({})
        return found | {"peak_bytes": found["peak_rss_bytes"]}

    how = "pipelined" if best["pipelined"] else "not pipelined"
    how += f", sub-groups of {best['sub_group_size'] // 10**6}M"
    how += f", {best['intra_op_parallelism']} I/O thread(s)"
    return [Contestant("deepspeed", turn, f"ZeRO-3, {how}")]


def _summary(field: Field, contestant: Contestant, limit: Sequence[float]) -> dict[str, Any]:
    """A contestant's line; what it does not know is None."""
    seconds = contestant.median()
    known = contestant.found[-1]
    moved = (
        known.get("read_bytes", known.get("read")),
        known.get("written_bytes", known.get("written")),
    )
    return {
        "comparison": "disk",
        "run": contestant.name,
        "settings": contestant.settings,
        "ms": seconds * 1e3,
        "min_ms": min(contestant.seconds) * 1e3,
        "max_ms": max(contestant.seconds) * 1e3,
        "read_bytes_per_param": None if moved[0] is None else moved[0] / field.numel,
        "written_bytes_per_param": None if moved[1] is None else moved[1] / field.numel,
        "peak_mib": known["peak_bytes"] / MIB if "peak_bytes" in known else None,
        "limit_ms": sorted(limit)[len(limit) // 2] * 1e3,
        "limit_reached": sorted(limit)[len(limit) // 2] / seconds,
    }
