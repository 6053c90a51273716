"""What the benchmarks of this folder share: their options, taking turns, and their rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch

import hf_paged

from .. import schema


def parser_of(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """With the options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    return parser


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round; each runs once before the clock starts."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    return seconds


def rows_of(
    seconds: dict[str, list[float]], counts: dict[str, int], metric: str, baseline: str, **common
) -> list[schema.Measure]:
    """Rates, and how many times faster than `baseline` each round was; both are printed.

    Args:
        counts: of what is counted (`metric`, per second) in a run of each system.
    """
    rows = []
    for name, taken in seconds.items():
        rates = [counts[name] / value for value in taken]
        per_one = [value / counts[name] for value in taken]
        gains = [base / counts[baseline] / mine for base, mine in zip(seconds[baseline], per_one)]
        rows.append(schema.Measure(**common, system=name, metric=metric, unit="1/s", samples=rates))
        if name != baseline:
            rows.append(schema.Measure(**common, system=name, metric="speed-up", unit="1", samples=gains, baseline=baseline))
        print(f"{name:26}{max(rates):9.2f} {metric}/s at best   {median(gains):6.2f} times {baseline}")
    return rows


def finish(rows: Iterable[schema.Measure], options: argparse.Namespace, workload: str, device: str = "cpu") -> None:
    """Put the rows into hetero.csv, and say what they were measured on."""
    machine = schema.describe_machine(device, options.threads)
    schema.replace_rows(options.out / "hetero.csv", rows, machine)
    print(f"{workload}; {machine.cpu}, {options.threads} threads; hf_paged {hf_paged.__version__}, commit {machine.commit}\n")
