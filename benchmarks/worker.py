"""A contestant in a process of its own, so that its CPU time and its memory are its own.

The parent sends one JSON object a line: first the settings, then requests. Each gets one line of
JSON back. What a library prints meanwhile goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Answer = Callable[[Json], Json]


class Worker:
    """The parent's end, a context manager; `log` is where the process's standard error goes.

    `about` is what the process said of itself. `before`: a command that runs another, such as one
    that enters a cgroup first. Raises SystemExit with what the process wrote to its log when it
    ends early.
    """

    def __init__(
        self,
        python: str,
        module: str,
        log: Path,
        settings: Json,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self._module = module
        self._log = log
        path = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [*before, python, "-m", module],
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
        self.about = self.ask(settings)

    def ask(self, message: Json) -> Json:
        """Sends a request and waits for its answer."""
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

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets the process clean up and end."""
        self._end()
        if kind is None and self._process.returncode != 0:
            raise self._failure()

    def close(self) -> None:
        """Ends the process now. Raises SystemExit when it ends with an error."""
        self.__exit__(None)

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it ended before it read everything
                    pipe.close()
        self._process.wait()

    def _failure(self) -> SystemExit:
        said = self._log.read_text(encoding="utf-8", errors="replace")[-4000:]
        return SystemExit(f"{self._module} ended with {self._process.returncode}:\n{said}")


def serve(prepare: Callable[[Json], tuple[Json, Answer, Callable[[], None]]]) -> None:
    """The worker's end: prepare(settings) gives (what to tell the parent, answer, close)."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: Json) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    about, answer, close = prepare(json.loads(sys.stdin.readline()))
    say(about)
    for line in sys.stdin:
        say(answer(json.loads(line)))
    close()
