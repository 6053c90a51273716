"""Results as they come: a CSV row and a printed line each, and in the end one table of values against targets."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import schema

MOST_NAMED = 20  # of the parts that were not measured, once more at the end


@dataclass(frozen=True)
class Target:
    """What a metric should reach. `at_most`: smaller is better."""

    value: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self):
        return f"{'at most' if self.at_most else 'at least'} {self.value:g}"


class Clock:
    """A time budget. `part` gives a piece of the program its share, never more than what is left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def part(self, seconds: float) -> Clock:
        return Clock(min(seconds, self.left))


class Report:
    """Writes every measure at once: what a run was able to do before it was cut off is kept."""

    def __init__(self, path: Path, device: torch.device, *, aims: bool = True):
        """`aims`: whether values are held against their targets."""
        self.path = path
        self.device = device
        self.aims = aims
        self.machine = schema.describe_machine(device_name(device), torch.get_num_threads())
        self._versions = {"triton": _triton_version(), "cuda": str(torch.version.cuda or torch.version.hip)}
        self._lines: list[tuple[str, str, float, str, Target | None]] = []
        self._skipped: list[str] = []
        self._failed = False

    def add(
        self, benchmark: str, workload: str, system: str, metric: str, unit: str, samples: Sequence[float], *,
        target: Target | None = None, model: str = "", dtype: str = "", baseline: str = "", **detail,
    ) -> float:  # fmt: skip
        """Record one metric and return its median. `detail` goes into the row as JSON, with the target."""
        value = schema.quantile(samples, 0.5)
        target = target if self.aims else None
        if target is not None:
            detail |= {"target": str(target), "met": target.met(value)}
        measure = schema.Measure(
            benchmark=benchmark, workload=workload, system=system, metric=metric, unit=unit, samples=samples,
            model=model, dtype=dtype, baseline=baseline, detail=detail | self._versions,
        )  # fmt: skip
        schema.append_rows(self.path, [measure], self.machine)
        name = " ".join(part for part in (benchmark, model, workload, dtype, metric) if part)
        system += f" / {baseline}" if baseline else ""
        self._lines.append((name, system, value, unit, target))
        print(line(name, system, value, unit, target), flush=True)
        return value

    def skip(self, what: str, why: str) -> None:
        """Say that something was not measured, here and again at the end."""
        self._skipped.append(f"{what}: {why}")
        print(f"  not measured: {what}: {why}", flush=True)

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """Run a part; if it fails, the others still run."""
        try:
            work()
        except Exception as error:
            self._failed = True
            self.skip(what, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the next part allocates has other sizes

    def close(self) -> int:
        """Print every value that has a target, and what was not measured. 1 if a part failed, else 0."""
        aimed = [entry for entry in self._lines if entry[4] is not None]
        print(f"\n{self.machine.device}, torch {self.machine.torch}, triton {self._versions['triton']}, transformers "
              f"{self.machine.transformers}, commit {self.machine.commit}: {len(self._lines)} values")  # fmt: skip
        for entry in aimed:
            print(line(*entry))
        met = sum(target.met(value) for *_, value, _, target in aimed)
        print(f"{met} of {len(aimed)} targets met; {len(self._skipped)} parts not measured; rows in {self.path}")
        for reason in self._skipped[:MOST_NAMED]:
            print(f"  not measured: {reason}")
        return 1 if self._failed else 0


def line(name: str, system: str, value: float, unit: str, target: Target | None) -> str:
    verdict = "" if target is None else f"   {'met' if target.met(value) else 'MISSED'}: {target}"
    return f"  {name:<64} {system:<36} {value:>9.4g} {unit:<8}{verdict}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def release_memory(device: torch.device) -> None:
    """What nothing refers to any more goes back to the device: cycles are looked for, which takes a while."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
