"""Memory of a process of its own: scripts that run under a cap, and what they took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

_PRELUDE = """
import json, resource, sys
from pathlib import Path
import torch
import torch._dynamo  # as wrap() does
from torch import nn
import offload

MIB = 1 << 20

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

def begin(extra):
    \"\"\"Forget the peak so far; allow `extra` bytes of private memory on top of what is.\"\"\"
    global before
    torch.randn(64, 64) @ torch.randn(64, 64)
    limit = status("VmData") + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")

def report(**more):
    print(json.dumps({"peak": status("VmHWM") - before, **more}))
"""


def run(script: str, *arguments: object) -> dict[str, Any]:
    """What `script`, in which begin(extra) and report() are defined, reports; it must not fail.

    ``peak`` is the highest resident memory after begin(), in bytes above that at begin().
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
