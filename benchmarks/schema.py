"""The one CSV schema of every benchmark: one row per workload, system and metric, with its spread and its machine."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a number was measured on: the columns every row of one run shares."""

    date: str
    commit: str
    device: str
    cpu: str
    threads: int
    python: str
    torch: str
    transformers: str
    hf_paged: str


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of one system on one workload. `samples` holds one value per repetition; the row keeps quantiles.

    `baseline` names the system a ratio is taken against. `detail` is anything else, kept as JSON.
    """

    benchmark: str
    workload: str
    system: str
    metric: str
    unit: str
    samples: Sequence[float]
    model: str = ""
    dtype: str = ""
    baseline: str = ""
    detail: dict = field(default_factory=dict)

    def row(self, machine: Machine) -> dict[str, object]:
        values = {name: f"{quantile(self.samples, share):.6g}" for name, share in QUANTILES.items()}
        own = {name: getattr(self, name) for name in ("benchmark", "workload", "system", "metric", "unit")}
        rest = {"baseline": self.baseline, "model": self.model, "dtype": self.dtype}
        detail = json.dumps(self.detail, sort_keys=True) if self.detail else ""
        samples = {"samples": len(self.samples)}
        return own | values | samples | rest | dataclasses.asdict(machine) | {"detail": detail}


QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
COLUMNS = (
    *("benchmark", "workload", "system", "metric", "unit", *QUANTILES, "samples", "baseline", "model", "dtype"),
    *(column.name for column in dataclasses.fields(Machine)),
    "detail",
)


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated linearly."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def describe_machine(device: str, threads: int) -> Machine:
    """This machine, now. `device` is "cpu" or a CUDA device's name."""
    return Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(),
        device=device,
        cpu=_cpu_name(),
        threads=threads,
        python=platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "hf_paged")},
    )


def append_rows(path: Path, measures: Iterable[Measure], machine: Machine) -> None:
    """Append rows to the CSV file at `path`, made with its header if it is not there.

    Raises ValueError if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        _read(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(measure.row(machine) for measure in measures)


def replace_rows(path: Path, measures: Iterable[Measure], machine: Machine) -> None:
    """As `append_rows`, in the place of older rows of the same workloads: equal in benchmark, workload, model, dtype and device."""
    new = [measure.row(machine) for measure in measures]
    same = {_subject(row) for row in new}
    kept = [row for row in (_read(path) if path.exists() else []) if _subject(row) not in same]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])
    written.replace(path)


def _subject(row: dict[str, object]) -> tuple:
    return tuple(row[name] for name in ("benchmark", "workload", "model", "dtype", "device"))


def _read(path: Path) -> list[dict[str, object]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; move it away")
        return list(reader)


def results_folder() -> Path:
    """benchmarks/results of the checkout this runs from, or ./hf_paged_results of an installed package."""
    in_checkout = (HERE.parent / "pyproject.toml").exists()
    return HERE / "results" if in_checkout else Path.cwd() / "hf_paged_results"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """Short hash of the checkout, with "+" if files differ from it; "unknown" outside one."""
    try:
        git = ["git", "-C", str(HERE)]
        shown = {"capture_output": True, "text": True, "check": True}
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **shown).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **shown).stdout.strip()
        return commit + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
