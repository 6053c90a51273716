"""Time per call of device work, measured in interleaved rounds.

A candidate is `run(i)` on input set i of several, all of the same shape. The calls of one sample go over the sets in
turn and, on CUDA, into one CUDA graph, so that a sample is events around a replay: kernels follow each other as in a
layer of the engine, without the host's launches. The sets together are larger than the L2 cache, so that every call
finds its inputs in device memory, where a decode step finds weights and keys too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

COLD_BYTES = 256 * 2**20  # more than twice the L2 cache of an H100 (50 MiB), H200 or B200 (126 MiB)
MIN_SAMPLE = 300e-6  # seconds of work in one sample: events resolve half a microsecond
MAX_CALLS = 64
ROUNDS = 15


def num_sets(bytes_per_set: float, limit: int = 32) -> int:
    """How many input sets of this size are needed for each call to start with a cold cache."""
    return max(1, min(limit, -(-COLD_BYTES // max(1, int(bytes_per_set)))))


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round. `graphed` is false if host launches may be part of it."""

    samples: list[float]
    graphed: bool

    @property
    def median(self) -> float:
        return sorted(self.samples)[len(self.samples) // 2]


def measure(
    candidates: Mapping[str, Callable[[int], object]], sets: int, device: torch.device, *, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Time all candidates, one sample of each per round.

    The first call of each (which compiles kernels) is not timed. A candidate that raises there is the caller's affair.
    """
    device = torch.device(device)
    make = _CudaSampler if device.type == "cuda" else _HostSampler
    samplers = {name: make(run, sets) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            samples[name].append(sampler.sample())
    return {name: Timing(samples[name], sampler.graphed) for name, sampler in samplers.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _HostSampler:
    """The wall clock around one pass over the sets."""

    graphed = False

    def __init__(self, run: Callable[[int], object], sets: int):
        self.run, self.sets = run, sets
        run(0)

    def sample(self) -> float:
        start = time.perf_counter()
        for i in range(self.sets):
            self.run(i)
        return (time.perf_counter() - start) / self.sets


class _CudaSampler:
    """Events around a CUDA graph of several passes over the sets; around plain launches if it cannot be captured."""

    def __init__(self, run: Callable[[int], object], sets: int):
        run(0)  # compiles, and allocates what is kept from call to call
        torch.cuda.synchronize()
        self.calls = sets
        pass_seconds = self._timed(lambda: _passes(run, sets, 1)) * sets
        passes = max(1, min(MAX_CALLS // sets, math.ceil(MIN_SAMPLE / pass_seconds)))
        self.calls = passes * sets
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                _passes(run, sets, passes)
            self._work, self.graphed = graph.replay, True
        except RuntimeError:  # the host waits for the device somewhere in it
            torch.cuda.synchronize()
            self._work, self.graphed = lambda: _passes(run, sets, passes), False
        self._work()
        torch.cuda.synchronize()

    def _timed(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls

    def sample(self) -> float:
        return self._timed(self._work)


def _passes(run: Callable[[int], object], sets: int, passes: int) -> None:
    for _ in range(passes):
        for i in range(sets):
            run(i)
