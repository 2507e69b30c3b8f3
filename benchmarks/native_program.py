"""Compiles what lies in benchmarks/native."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"


def compile_program(name: str) -> Path:
    """The program, built by this Python's cmake where it is not up to date (minutes at first).

    Raises SystemExit with what cmake said.
    """
    programs = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    configure += ["-DOFFLOAD_BUILD_PYTHON=OFF", "-DOFFLOAD_BUILD_BENCHMARKS=ON"]
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", name]):
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise SystemExit(run.stdout + run.stderr)
    return BUILD / name
