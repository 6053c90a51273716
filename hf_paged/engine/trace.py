"""Where the time of every step goes, in the format of Chrome's traces (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path


class StepTrace:
    """Collects the phases of steps; see `metrics.StepClock` for what they are."""

    def __init__(self):
        self._events: list[dict] = []
        self._start = time.perf_counter()

    def span(self, phase: str, begin: float, end: float) -> None:
        """A phase from `begin` to `end`, both of `time.perf_counter()`. Those of one step lie in its "total", a "step"."""
        name = "step" if phase == "total" else phase
        self._add(name, "X", begin, dur=(end - begin) * 1e6)

    def amounts(self, name: str, **values: float) -> None:
        """Numbers as they are now, drawn as one chart."""
        self._add(name, "C", time.perf_counter(), args=values)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _add(self, name: str, kind: str, at: float, **more) -> None:
        place = dict(pid=os.getpid(), tid=threading.get_native_id())
        self._events.append(dict(name=name, ph=kind, ts=(at - self._start) * 1e6, **place, **more))
