"""The processes that are measured: `hf-paged serve`, and an engine alone. They take turns; who waits does nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

import hf_paged
from hf_paged.benchmarks.workers import WorkerProcess
from hf_paged.cli import serve

SPINS = {"GOMP_SPINCOUNT": serve.SPINS}  # the engine alone waits for its threads as the server's does
START_SECONDS = 300  # the embedded model may have to be fetched and built


def _environment() -> dict[str, str]:
    """This project first, installed or not."""
    paths = [str(Path(hf_paged.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class EngineAlone(WorkerProcess):
    """An engine in a process of its own, driven by `worker`."""

    def __init__(self, **arguments):
        super().__init__("the engine", "server.worker", arguments, SPINS)


@dataclass(frozen=True)
class Reading:
    """What a server had done at one moment.

    Attributes:
        loop_seconds: CPU time of the thread that runs the event loop.
        lag: buckets of the event loop's lag: upper bound in seconds -> how many looks were at most that late.
        steps: of the engine.
    """

    loop_seconds: float
    lag: dict[float, float] = field(default_factory=dict)
    steps: int = 0

    def lag_since(self, earlier: Reading, share: float) -> float:
        """Seconds that `share` of the looks since then were at most late; linear within a bucket."""
        grown = {bound: count - earlier.lag.get(bound, 0) for bound, count in sorted(self.lag.items())}
        wanted = share * max(grown.values())
        low = before = 0.0
        for bound, count in grown.items():
            if count >= wanted:
                part = (wanted - before) / (count - before) if count > before else 1.0
                return low if bound == float("inf") else low + part * (bound - low)
            low, before = bound, count
        return low


class Server:
    """A running `hf-paged serve` on this machine (Linux, whose /proc tells CPU time and memory).

    Args:
        model: as the command takes it.
        options: more of its options.
    """

    def __init__(self, model: str | None, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "hf_paged", "serve", *([] if model is None else [model])]
        command += ["--port", str(self.port), *options]
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, env=_environment(), stdout=self._log, stderr=self._log)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self._get("/health")
                return
            except (urllib.error.URLError, ConnectionError):
                if self._process.poll() is not None or time.monotonic() > until:
                    self._log.seek(0)
                    log = self._log.read().decode(errors="replace")
                    self.close()
                    raise RuntimeError(f"hf-paged serve did not come up; its log:\n{log}") from None
                time.sleep(0.2)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def read(self) -> Reading:
        """Its numbers now."""
        pid = self._process.pid
        seconds = int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9
        lag, steps = {}, 0
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                if sample.name == "hf_paged:event_loop_lag_seconds_bucket":
                    lag[float(sample.labels["le"])] = sample.value
                elif sample.name == "hf_paged:steps_total":
                    steps = int(sample.value)
        return Reading(seconds, lag, steps)

    def resident(self) -> int:
        """Bytes of its own memory, without what is mapped from files."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024

    def close(self) -> None:
        """Ask it to end, as an operator would."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._log.close()
