"""Quantized weights and caches on the CPU, side by side: tokens per second, memory, and what the rounding costs.

    python benchmarks/run.py quant.engine [--systems fp32,int4] [--threads 2] [--short]

Every system is a process of its own that keeps its model, and they take turns: each part of a round runs on all of them,
one after another, so that ratios compare runs of nearly the same minute. Ratios are of the same round, to the first
system. The model's own dtype of keys and values is meant where a system names none.

Quality is measured on the text of Python's reference: perplexity, the mean difference of its tokens' log-probabilities,
and how often the most likely token is the same one.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.workers import WorkerProcess

from .worker import SYSTEMS

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """How much is measured. `decodes`: name -> (sequences, tokens of context before the first step)."""

    rounds: int = 3
    steps: int = 24
    requests: int = 48
    windows: int = 6
    window: int = 512
    decodes: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {
            "decode of 1": (1, 128),
            "decode of 4": (4, 128),
            "decode of 16": (16, 128),
            "decode of 4 at 1024": (4, 1024),
        }
    )


SHORT = Plan(rounds=1, steps=3, requests=3, windows=1, window=64,
             decodes={"decode of 1": (1, 32), "decode of 4": (4, 32)})  # fmt: skip


@dataclass
class Result:
    """What one system did. `rates`: workload -> tokens per second of each round."""

    about: dict
    rates: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    score: dict = field(default_factory=dict)
    mixed: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(-fmean(self.score["logprobs"]))

    def difference(self, other: Result) -> float:
        pairs = zip(self.score["logprobs"], other.score["logprobs"], strict=True)
        return fmean(abs(mine - its) for mine, its in pairs)

    def same_best(self, other: Result) -> float:
        return fmean(a == b for a, b in zip(self.score["best"], other.score["best"], strict=True))


def run(names: list[str], plan: Plan, *, model: str | None = None, threads: int = 2) -> dict[str, Result]:
    with ExitStack() as stack:
        processes = []
        for name in names:  # one after another: loading takes both cores
            print(f"loading {name}", flush=True)
            arguments = {"name": name, "model": model, "threads": threads}
            processes.append(stack.enter_context(closing(WorkerProcess(name, "quant.worker", arguments))))
        results = {process.name: Result(process.about) for process in processes}
        for process in processes:
            results[process.name].score = process.run("score", windows=plan.windows, length=plan.window)
        for turn in range(plan.rounds):
            for workload, (sequences, context) in plan.decodes.items():
                for process in processes:
                    answer = process.run("decode", sequences=sequences, context=context, steps=plan.steps)
                    results[process.name].rates[workload].append(answer["rate"])
            print(f"round {turn + 1} of {plan.rounds}: decoded", flush=True)
        for process in processes:
            result = results[process.name]
            result.mixed = process.run("mixed", requests=plan.requests, turn=0)
            result.rates["mixed"].append(result.mixed["rate"])
            result.memory = process.run("memory")
    return results


def measures(results: dict[str, Result], plan: Plan) -> list[schema.Measure]:
    baseline = next(iter(results))
    return [row for name in results for row in _measures_of(name, results[name], baseline, results[baseline], plan)]


def _measures_of(name: str, result: Result, baseline: str, first: Result, plan: Plan) -> Iterator[schema.Measure]:
    system, about = SYSTEMS[name], result.about
    common = dict(benchmark="quant", system=name, model=about["model"], dtype=system.dtype)
    common["detail"] = dict(quantization=system.quantization, kv_dtype=system.kv_dtype)
    for workload, rates in result.rates.items():
        here = dict(common, workload=workload)
        if workload == "mixed":
            here["detail"] = here["detail"] | dict(requests=plan.requests, fingerprint=result.mixed["fingerprint"])
        yield schema.Measure(**here, metric="output_tokens", unit="1/s", samples=rates)
        if result is not first:
            ratios = [mine / its for mine, its in zip(rates, first.rates[workload], strict=True)]
            yield schema.Measure(**here, metric="speed-up", unit="ratio", samples=ratios, baseline=baseline)
    for metric, size in (
        ("weights", about["weights"]),
        ("kv_per_token", about["kv_per_token"]),
        ("kv_peak", result.mixed["kv_peak"]),
        ("memory_peak", result.memory["peak"]),
        ("memory_own", result.memory["own"]),
    ):
        yield schema.Measure(**common, workload="all", metric=metric, unit="bytes", samples=[size])
    here = dict(common, workload="text", detail=common["detail"] | dict(tokens=len(result.score["best"])))
    yield schema.Measure(**here, metric="perplexity", unit="1", samples=[result.perplexity])
    if result is not first:
        for metric, unit, value in (
            ("logprob_difference", "nat", result.difference(first)),
            ("same_best_token", "share", result.same_best(first)),
        ):
            yield schema.Measure(**here, metric=metric, unit=unit, samples=[value], baseline=baseline)


def print_table(results: dict[str, Result], plan: Plan, machine: schema.Machine) -> None:
    baseline, first = next(iter(results.items()))
    workloads = [*plan.decodes, "mixed"]
    print(f"\n{machine.cpu}, {machine.threads} threads, torch {machine.torch}, transformers {machine.transformers}, commit "
          f"{machine.commit}\nOutput tokens per second (times {baseline}'s); MiB of the weights, and of the process: "
          "its own when it serves, and the most there\never was with mapped files; bytes of cache per token; perplexity; "
          "share of tokens where the same one is most likely")  # fmt: skip
    print(f"{'':14}" + "".join(f"{name:>20}" for name in workloads)
          + f"{'weights':>9}{'own':>7}{'peak':>7}{'KV/token':>10}{'perplexity':>12}{'same':>8}")  # fmt: skip
    for name, result in results.items():
        line = f"{name:14}"
        for workload in workloads:
            pairs = zip(result.rates[workload], first.rates[workload])
            rate, ratio = median(result.rates[workload]), median(mine / its for mine, its in pairs)
            line += f"{f'{rate:.1f} ({ratio:.2f})':>20}"
        sizes = ((9, result.about["weights"]), (7, result.memory["own"]), (7, result.memory["peak"]))
        line += "".join(f"{size / MIB:{width}.0f}" for width, size in sizes)
        print(f"{line}{result.about['kv_per_token']:10.0f}{result.perplexity:12.3f}{result.same_best(first):8.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of the default, the first being the baseline")
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--short", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    names = options.systems.split(",")
    for name in names:
        if name not in SYSTEMS:
            parser.error(f"--systems has no {name!r}; there are {', '.join(SYSTEMS)}")
    plan = SHORT if options.short else Plan()
    results = run(names, plan, model=options.model, threads=options.threads)
    machine = schema.describe_machine("cpu", options.threads)
    schema.append_rows(options.out / "quant.csv", measures(results, plan), machine)
    print_table(results, plan, machine)
    print(f"rows appended to {options.out / 'quant.csv'}")


if __name__ == "__main__":
    main()
