"""The swap store against fio and DeepSpeed's async_io: bytes per second and CPU time per byte.

Reads, writes and the optimizer pipeline's mix of both, all O_DIRECT, taking turns in orders in
which nobody always follows the same one. The mix is four reads for three writes; beside it, without
a bar, is the pipeline itself, which updates what it moves. fio runs at the store's block size and
depth (1 MiB, 16), with the engine and buffers that trials before each comparison found fastest; the
settings of DeepSpeed's handle and the size of its tensors are chosen likewise.

fio never reads what the disk moved into its buffers; the store checksums it all. What that alone
costs, a bare loop of liburing shows that does the same (benchmarks/native/checked_loop.cc,
compiled by the cmake of this Python): the limit of anyone who reads what was moved. Under a virtual
machine the host overwrites more slowly what our cores have read.

All share one file, the store's own, and in a round they all start at the same place in it: a disk
is not equally fast everywhere (fio on a virtual one: 2816 MB/s in the first eighth of a file, 3204
in another, again and again; another file as a whole, 0.957). What a peer writes there is what the
store knows to be there: its checksums hold, and are compared. Only the pipeline, which changes
bytes, has a file of its own.

What is to be measured is a disk, which training state is larger than any cache of: O_DIRECT passes
by this machine's page cache, but under a virtual machine the host has one. So the file is of
16 GiB, and a round goes on where the last one ended. Within a round such a cache may hold what the
one before has just moved; the order of the turns evens that out.

How fast a disk is can depend on how much memory the transfers rotate over: under a virtual machine
the host copies, and what was used a moment ago is in its cache. fio's buffers are depth x block,
16 MiB, and cannot be more; the store's are --buffers, 18 MiB in blocks, so that like is compared
with like: the depth in flight, and two that are checksummed meanwhile. A training run rotates over
more: --buffers 192 measures that.

    python benchmarks/io.py                       # about 8 minutes, 33 GB of disk
    python benchmarks/io.py --only read --swap-dir /mnt/nvme
    python benchmarks/io.py --peer-venv VENV      # with DeepSpeed

DeepSpeed is measured where this Python has it, or in a virtual environment of its own, which keeps
what DeepSpeed compiles when it is first used (minutes; libaio's headers are needed):

    python -m venv VENV && VENV/bin/pip install torch deepspeed==0.19.8
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Bar, add_common_options, deepspeed_python, finish, in_turn, print_rows
from io_peers.checked_loop import CACHE_USES, CheckedLoop
from io_peers.fio import Fio, FioError, candidates
from io_peers.huge_pages import reserved_huge_pages
from io_peers.measurement import MIB, WORKLOADS, Cursor, Measurement
from native_program import compile_program
from worker import Worker

LEAST_OF_FIO = 0.97
FIO_BUFFERS = 64 * MIB
# A host keeps what was moved last, and moves faster what it has moved before: the file's size was
# moved this often when the rounds that count begin.
LAPS = 3
DEEPSPEED_TENSORS = (2, 8, 64)  # MiB; twelve of them are its buffers
NAMES = {"read": "reads", "write": "writes", "mix": "optimizer mix"}


@dataclass
class Contestant:
    """Who is measured: `settings` are tried for each workload, the best one takes part."""

    name: str
    settings: Mapping[str, Sequence[Any]]  # of each workload
    measure: Callable[[str, float, Any, int], Measurement]  # from a byte of the file on
    describe: Callable[[Any], str]
    on_the_file: bool = True  # that the others measure on
    chosen: Any = None
    found: list[Measurement] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    """The options; --quick replaces sizes and counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    add = parser.add_argument
    add("--only", choices=WORKLOADS, help="one of the comparisons")
    add("--rounds", type=int, default=11, help="turns of each contestant")
    add("--seconds", type=float, default=2.0, help="length of a measurement")
    add("--pause", type=float, default=1.0, metavar="SECONDS", help="before each measurement")
    add("--size", type=int, default=16384, metavar="MIB", help="of the file")
    add("--buffers", type=int, default=18, metavar="MIB", help="of the store's reads and writes")
    add("--swap-dir", metavar="PATH", default=tempfile.gettempdir())
    add("--peer-venv", metavar="PATH", help="virtual environment with DeepSpeed")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.size = 1, 0.2, 256
        options.pause = 0.0
    if options.pause < 0:
        parser.error("--pause must not be negative")
    if options.rounds < 1 or options.seconds <= 0 or options.size < 64 or options.size % 64 != 0:
        parser.error("--rounds and --seconds must be positive, --size a multiple of 64")
    if not 0 < options.buffers <= options.size // 2:
        parser.error("--buffers must be positive, and --size twice that")
    return options


def measured_by(worker: Worker) -> Callable[[str, float, Any, int], Measurement]:
    """Asks the worker's process: a workload, its seconds after a ramp, a setting, a place."""

    def measure(workload: str, seconds: float, setting: Any, start: int) -> Measurement:
        request = {"workload": workload, "seconds": seconds, "start": start, **setting}
        return Measurement(**worker.ask(request))

    return measure


def swap_store(worker: Worker) -> Contestant:
    """The swap store; it has no settings to try."""
    about = worker.about["config"]
    print(f"offload: {about}: {worker.about['why']}", flush=True)
    settings: dict[str, list[Any]] = {workload: [{}] for workload in WORKLOADS}
    return Contestant("offload", settings, measured_by(worker), lambda _: str(about))


def update_pipeline(worker: Worker) -> Contestant:
    """AdamW by the update pipeline on that store: the mix, and the arithmetic it is for."""

    def describe(_: Any) -> str:
        return f"{worker.about['config']}, AdamW in between"

    settings = {"mix": [{"update": True}]}
    return Contestant("offload-adamw", settings, measured_by(worker), describe, on_the_file=False)


def fio(peer: Fio, huge_pages: bool, quick: bool) -> Contestant:
    """fio; with --quick, the first of its candidates alone."""
    if not huge_pages:
        print("no huge pages may be reserved: fio gets transparent ones through glibc's malloc")
    tried = candidates(huge_pages)[: 1 if quick else None]
    return Contestant("fio", dict.fromkeys(WORKLOADS, tried), peer.measure, str)


def checked_loop(file: str, size: int) -> Contestant:
    """The bare loop with checksums."""
    print("checked-loop: compiling it", flush=True)
    loop = CheckedLoop(compile_program("checked_loop"), file, size)
    tried = dict.fromkeys(WORKLOADS, CACHE_USES)
    return Contestant("checked-loop", tried, loop.measure, lambda use: f"checksums, caches: {use}")


def deepspeed(worker: Worker, quick: bool) -> Contestant:
    """DeepSpeed's async_io; with --quick, the first of its settings alone."""
    print(f"deepspeed: {worker.about['version']}", flush=True)
    alone = [
        {
            "overlap_events": overlap,
            "intra_op_parallelism": threads,
            "handles": handles,
            "tensor_bytes": mib * MIB,
        }
        for mib, overlap, threads, handles in itertools.product(
            DEEPSPEED_TENSORS, (True, False), (1, 2), (1, 2)
        )
    ][: 1 if quick else None]
    in_mix = [{**setting, "handles": 2} for setting in alone if setting["handles"] == 1]

    def describe(setting: Mapping[str, Any]) -> str:
        overlapping = "overlap" if setting["overlap_events"] else "no overlap"
        threads, handles = setting["intra_op_parallelism"], setting["handles"]
        tensors = f"tensors of {setting['tensor_bytes'] // MIB} MiB"
        return f"1 MiB x 16, {overlapping}, {handles} handle(s) of {threads} thread(s), {tensors}"

    settings = {"read": alone, "write": alone, "mix": in_mix}
    return Contestant("deepspeed", settings, measured_by(worker), describe)


def choose(
    contestant: Contestant, workload: str, seconds: float, cursor: Cursor
) -> list[Measurement]:
    """Tries the contestant's settings, twice each, and takes the one that was once the fastest.

    Settings that the peer refuses are told and left out.
    """
    tried = list(contestant.settings[workload])
    contestant.chosen, contestant.found = tried[0], []
    if len(tried) == 1:
        return []
    best: list[tuple[Measurement, Any]] = []
    for setting in [*tried, *reversed(tried)]:
        try:
            found = contestant.measure(workload, seconds, setting, cursor.position)
        except FioError as error:
            print(f"left out: {error}")
        else:
            best.append((found, setting))
    if not best:
        raise SystemExit(f"{contestant.name}: every setting was refused")
    cursor.move(measurement for measurement, _ in best)
    contestant.chosen = max(best, key=lambda trial: trial[0].rate)[1]
    print(
        f"{NAMES[workload]}, {contestant.name}: {contestant.describe(contestant.chosen)}",
        flush=True,
    )
    return [measurement for measurement, _ in best]


def play_round(
    contestants: Sequence[Contestant],
    workload: str,
    number: int,
    options: argparse.Namespace,
    cursor: Cursor,
) -> None:
    """A measurement more in everyone's `found`."""
    for contestant in in_turn(contestants, number):
        time.sleep(options.pause)
        found = contestant.measure(workload, options.seconds, contestant.chosen, cursor.position)
        contestant.found.append(found)
    cursor.move(contestant.found[-1] for contestant in contestants)


def warm(
    contestants: Sequence[Contestant], workload: str, options: argparse.Namespace, cursor: Cursor
) -> None:
    """Rounds that do not count, until LAPS times the file's size was moved."""
    rounds, moved = 0, 0.0
    while moved < LAPS * options.size * MIB:
        play_round(contestants, workload, rounds, options, cursor)
        sharing = (c for c in contestants if c.on_the_file)
        moved += sum(contestant.found.pop().nbytes_with_ramp for contestant in sharing)
        rounds += 1
    for contestant in contestants:
        contestant.found.clear()


def compare(
    workload: str, contestants: Sequence[Contestant], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(one row per round, one row per contestant) of one workload."""
    contestants = [c for c in contestants if workload in c.settings]
    cursor = Cursor(options.size * MIB)
    trials = [m for c in contestants for m in choose(c, workload, options.seconds / 4, cursor)]
    if not options.quick:
        warm(contestants, workload, options, cursor)
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        play_round(contestants, workload, number, options, cursor)
        row: dict[str, Any] = {"workload": workload, "round": number + 1}
        row |= {f"{c.name}_mb_per_s": c.found[-1].rate / 1e6 for c in contestants}
        ours, *peers = contestants
        row |= {f"ratio_to_{c.name}": ours.found[-1].rate / c.found[-1].rate for c in peers}
        rounds.append(row)
    print_rows(NAMES[workload], rounds)
    limit = max(m.rate for m in [*trials, *(m for c in contestants for m in c.found)])
    return rounds, [summary(workload, c, contestants[0], limit) for c in contestants]


def summary(
    workload: str, contestant: Contestant, ours: Contestant, limit: float
) -> dict[str, Any]:
    """A contestant's line; `limit` is the highest rate that anyone reached."""
    found = contestant.found
    ratios = (mine.rate / one.rate for mine, one in zip(ours.found, found, strict=True))
    rate = statistics.median(m.rate for m in found)

    def per_mib(seconds: Iterable[float]) -> float:
        pairs = zip(seconds, found, strict=True)
        return statistics.median(s / m.nbytes * MIB * 1e6 for s, m in pairs)

    return {
        "workload": workload,
        "run": contestant.name,
        "settings": contestant.describe(contestant.chosen),
        "mb_per_s": rate / 1e6,
        "min_mb_per_s": min(m.rate for m in found) / 1e6,
        "max_mb_per_s": max(m.rate for m in found) / 1e6,
        "limit_reached": rate / limit,
        "offload_ratio": statistics.median(ratios),
        "cpu_s_per_gb": statistics.median(m.cpu_per_byte for m in found) * 1e9,
        "user_us_per_mib": per_mib(m.user_seconds - m.compute_seconds for m in found),
        "system_us_per_mib": per_mib(m.system_seconds for m in found),
        "compute_us_per_mib": per_mib(m.compute_seconds for m in found),
    }


def ratio_bars(rounds: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The bars of one workload's rounds, and the spread of each ratio in its name."""
    bars = []
    for peer, target in (("fio", LEAST_OF_FIO), ("deepspeed", 1.0)):
        ratios = [row[f"ratio_to_{peer}"] for row in rounds if f"ratio_to_{peer}" in row]
        if ratios:
            name = f"{NAMES[rounds[0]['workload']]}, offload / {peer}, median of {len(ratios)}"
            spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
            bars.append(Bar(f"{name} ({spread})", statistics.median(ratios), target, at_least=True))
    return bars


def main() -> int:
    """Returns 1 if a bar fails."""
    options = parse_arguments()
    rounds: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    bars: list[Bar] = []
    peer = deepspeed_python(options.peer_venv)
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="offload-io-", dir=options.swap_dir)
        )
        huge_pages = stack.enter_context(reserved_huge_pages(FIO_BUFFERS))
        settings = {
            "folder": folder,
            "size": options.size * MIB,
            "buffers": options.buffers * MIB,
        }

        def start(python: str, module: str, env: Mapping[str, str]) -> Worker:
            log = Path(folder) / f"{module}.log"
            return stack.enter_context(Worker(python, module, log, settings, env))

        ours = start(sys.executable, "io_peers.swap_store", {})
        settings["file"] = ours.about["file"]
        contestants = [swap_store(ours), update_pipeline(ours)]
        try:
            peer_fio = Fio(settings["file"], options.size * MIB)
        except FioError as error:
            raise SystemExit(f"there is nothing to compare with: {error}") from None
        contestants.append(fio(peer_fio, huge_pages, options.quick))
        if not options.quick:
            contestants.append(checked_loop(settings["file"], options.size * MIB))
        if peer is not None:
            print("deepspeed: loading async_io; the first time compiles it", flush=True)
            worker = start(peer[0], "io_peers.deepspeed_aio", peer[1])
            contestants.append(deepspeed(worker, options.quick))
        for workload in WORKLOADS if options.only is None else (options.only,):
            turns, lines = compare(workload, contestants, options)
            rounds += turns
            summaries += lines
            if peer is None:
                nobody = {"run": "deepspeed", "settings": "not installed: skipped"}
                summaries.append({"workload": workload, **nobody})
            bars += [] if options.quick else ratio_bars(turns)
    print_rows("medians; of CPU time, the processes' own: none of kernel threads", summaries)
    return finish(options, options.swap_dir, [*rounds, *summaries], bars)


if __name__ == "__main__":
    sys.exit(main())
