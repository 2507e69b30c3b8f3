"""fio on a file that is there and written throughout, O_DIRECT, sequential."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass

from io_peers.measurement import MIB, PATTERN, RAMP_SECONDS, Measurement

# Reads in the mix, in percent: an update reads four operands and writes three.
MIX_READ_PERCENT = 57
_SHAPES = ((MIB, 16),)  # the store's own block size and depth
_ENGINES = {
    "libaio": ["--ioengine=libaio"],
    "io_uring": ["--ioengine=io_uring"],
    "io_uring, fixed": ["--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1"],
}
# Huge pages by reservation, by madvise (a setting of glibc's malloc), and none.
_MEMORY = {"huge pages": "mmaphuge", "transparent huge pages": "malloc", "small pages": "malloc"}


class FioError(Exception):
    """fio refused a job or failed in it."""


@dataclass(frozen=True)
class FioConfig:
    """One way to run fio."""

    engine: str
    block_bytes: int
    depth: int
    memory: str

    def __str__(self) -> str:
        return f"{self.engine}, {self.block_bytes // MIB} MiB x {self.depth}, {self.memory}"


def candidates(huge_pages: bool) -> list[FioConfig]:
    """What fio's best is looked for among: engines and buffers, at the store's block and depth."""
    memory = "huge pages" if huge_pages else "transparent huge pages"
    large = [FioConfig(e, block, depth, memory) for e in _ENGINES for block, depth in _SHAPES]
    return large + [FioConfig(e, *_SHAPES[0], "small pages") for e in _ENGINES]


class Fio:
    """fio on the first `size` bytes of `file`, which hold PATTERN. FioError: not installed."""

    def __init__(self, file: str, size: int) -> None:
        program = shutil.which("fio")
        if program is None:
            raise FioError("fio is not installed")
        self._command = [program, "--name=peer", f"--filename={file}"]
        self._command += ["--direct=1", "--output-format=json"]
        self._command += [f"--buffer_pattern=0x{PATTERN.hex()}"]
        self._size = size

    def measure(self, workload: str, seconds: float, config: FioConfig, start: int) -> Measurement:
        """Runs `workload` from byte `start`, for `seconds` after a ramp. Raises FioError."""
        how = [f"--offset={start}", f"--size={self._size - start}"]
        how.append("--rw=" + {"read": "read", "write": "write", "mix": "rw"}[workload])
        if workload == "mix":
            how.append(f"--rwmixread={MIX_READ_PERCENT}")
        how += _ENGINES[config.engine]
        how += [f"--bs={config.block_bytes}", f"--iodepth={config.depth}"]
        how += [f"--mem={_MEMORY[config.memory]}", "--fallocate=none", "--overwrite=1"]
        how += ["--time_based", f"--runtime={round(1000 * seconds)}ms"]
        how += [f"--ramp_time={round(1000 * RAMP_SECONDS)}ms"]
        # What costs fio CPU time and is not I/O: statistics, and changing what it writes.
        how += ["--gtod_reduce=1", "--scramble_buffers=0", "--refill_buffers=0"]
        return self._run(how, config.memory)

    def _run(self, how: list[str], memory: str) -> Measurement:
        tunable = f"glibc.malloc.hugetlb={int(memory == 'transparent huge pages')}"
        run = subprocess.run(
            [*self._command, *how],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GLIBC_TUNABLES": tunable},
        )
        start = run.stdout.find("{")  # warnings may come before it
        if run.returncode != 0 or start < 0:
            said = (run.stderr + run.stdout[: max(start, 0)]).strip()
            raise FioError(f"fio {' '.join(how)} ended with {run.returncode}: {said}")
        job = json.loads(run.stdout[start:])["jobs"][0]
        if job["error"] != 0:
            raise FioError(f"fio {' '.join(how)}: {os.strerror(job['error'])}")
        seconds = job["job_runtime"] / 1000
        return Measurement(
            seconds,
            job["read"]["io_bytes"],
            job["write"]["io_bytes"],
            job["usr_cpu"] / 100 * seconds,
            job["sys_cpu"] / 100 * seconds,
        )
