"""A bare loop of liburing that checksums what it moves: the limit of anyone who does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from io_peers.measurement import PATTERN, RAMP_SECONDS, Measurement

# How the checksum is to leave the core's caches; which is faster is up to the host.
CACHE_USES = ("pass", "keep")


class CheckedLoop:
    """`program`, of benchmarks/native/checked_loop.cc, on the first `size` bytes of `file`."""

    def __init__(self, program: Path, file: str, size: int) -> None:
        self._command = [str(program), file]
        self._size = size

    def measure(self, workload: str, seconds: float, cache_use: str, start: int) -> Measurement:
        """Runs `workload` from byte `start`. Raises SystemExit with what the program says."""
        how = [workload, str(RAMP_SECONDS), str(seconds), str(start), str(self._size), cache_use]
        run = subprocess.run(
            [*self._command, *how, PATTERN.hex()], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise SystemExit(f"checked_loop {' '.join(how)}: {run.stderr.strip()}")
        return Measurement(**json.loads(run.stdout))
