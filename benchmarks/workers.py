"""Processes that are measured in turns: each keeps what it measures, and does what it is told.

A worker's module is run by `benchmarks/run.py`. It reads one JSON object a line, {"task": name, ...arguments}, and writes one
for each: what its object's method of that name returned. The first line it writes is what the object says of itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

from . import schema


class WorkerProcess:
    """A running worker.

    Args:
        name: how errors call it.
        module: of the worker, below `benchmarks`.
        arguments: of its object.
        environment: variables beside those of this process.

    Attributes:
        about: what it said of itself.
    """

    def __init__(self, name: str, module: str, arguments: dict, environment: dict[str, str] | None = None):
        command = [sys.executable, str(schema.HERE / "run.py"), module, json.dumps(arguments)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name
        self._process = subprocess.Popen(command, env=os.environ | (environment or {}), **pipes)
        self.about = self._answer()

    def run(self, task: str, **arguments) -> dict:
        print(json.dumps({"task": task, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{self.name}: the process ended with status {self._process.returncode}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def obey(make: Callable) -> None:
    """A worker's whole run.

    Args:
        make: called with the arguments; gives the object, whose `describe` says what it is.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr  # whatever else prints
    worker = make(**json.loads(sys.argv[1]))
    print(json.dumps(worker.describe()), file=answers)
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps(getattr(worker, call.pop("task"))(**call)), file=answers)
