"""A contestant in a process of its own, so that its CPU time is its own.

The parent sends one JSON object a line: first the settings, then requests. Each gets one line of
JSON back. What a library prints meanwhile goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from io_peers.measurement import Measurement

Json = dict[str, Any]
Measure = Callable[[Json], Measurement]


class Worker:
    """The parent's end, a context manager; `log` is where the process's standard error goes.

    Raises SystemExit with what the process wrote there when it ends early.
    """

    def __init__(
        self,
        python: str,
        module: str,
        log: Path,
        settings: Json,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._log = log
        path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    **(env or {}),
                    "PYTHONPATH": os.pathsep.join(filter(None, path)),
                },
            )
        self.about = self._call(settings)

    def measure(self, workload: str, seconds: float, config: Json) -> Measurement:
        """Runs `workload` for `seconds` after a ramp."""
        request = {"workload": workload, "seconds": seconds, **config}
        return Measurement(**self._call(request))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets the process clean up and end."""
        self._end()
        if kind is None and self._process.returncode != 0:
            raise self._failure()

    def _call(self, message: Json) -> Json:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._end()
            raise self._failure()
        found: Json = json.loads(answer)
        return found

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it ended before it read everything
                    pipe.close()
        self._process.wait()

    def _failure(self) -> SystemExit:
        said = self._log.read_text(encoding="utf-8", errors="replace")[-4000:]
        return SystemExit(f"{self._module} ended with {self._process.returncode}:\n{said}")


def serve(prepare: Callable[[Json], tuple[Json, Measure, Callable[[], None]]]) -> None:
    """The worker's end: prepare(settings) gives (what to tell the parent, measure, close)."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(message: Json) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    about, measure, close = prepare(json.loads(sys.stdin.readline()))
    answer(about)
    for line in sys.stdin:
        answer(asdict(measure(json.loads(line))))
    close()
