"""A KV cache that is too small, with host memory behind it and without.

    python benchmarks/run.py engine.offload

- prefixes     prompts that begin with one of several prefixes, in turn; the cache holds half of the prefixes
- preemption   long outputs side by side; the cache holds half of what they come to

Both sides take turns, each in an engine of its own that has done the same work once before the clock starts. The tokens
of both are compared.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.hf.build import load_model

from .. import schema

WITH, WITHOUT = "host memory", "none"
BLOCK = 16


@dataclass(frozen=True)
class Plan:
    """Sizes of the work: `requests` side by side, or prefixes; `prompt` and `output` in tokens."""

    requests: int
    prompt: int
    output: int
    rounds: int


def prompts(plan: Plan, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, vocabulary) for _ in range(plan.prompt)] for _ in range(plan.requests)]


def prefixes(engine: Engine, plan: Plan) -> list[list[int]]:
    """One prompt after another, each with a few tokens of its own after its prefix."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    jobs = prompts(plan, engine.model.vocab_size)
    return [engine.generate([job + [5, 7, 9]], params)[0].outputs[0].token_ids for job in jobs]


def preemption(engine: Engine, plan: Plan) -> list[list[int]]:
    """All at once; their prompts are new to the cache every time."""
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=plan.output, ignore_eos=True)
    return [output.outputs[0].token_ids for output in engine.generate(prompts(plan, engine.model.vocab_size), params)]


WORKLOADS = {"prefixes": prefixes, "preemption": preemption}


def memory(model, plan: Plan, workload: str) -> int:
    """Bytes for half of what the work comes to."""
    with Engine(model, config=EngineConfig(block_size=BLOCK)) as engine:
        length = plan.prompt + (plan.output if workload == "preemption" else BLOCK)
        return int(plan.requests * length / 2 * engine._cache.bytes_per_token)


def measure(model, plan: Plan, workload: str) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """(seconds of every system in every round, its numbers in the last one)."""
    seconds: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    stats: dict[str, dict] = {}
    expected = None
    small = memory(model, plan, workload)
    for _ in range(plan.rounds):
        for system in seconds:
            options = dict(block_size=BLOCK, kv_cache_memory=small, offload=8 * small if system == WITH else None)
            with Engine(model, config=EngineConfig(max_num_seqs=max(8, plan.requests), **options)) as engine:
                work = WORKLOADS[workload]
                expected = expected or work(engine, plan)
                assert work(engine, plan) == expected, "other tokens"
                engine.reset_stats()
                started = time.perf_counter()
                assert work(engine, plan) == expected, "other tokens"
                seconds[system].append(time.perf_counter() - started)
                names = ("preemptions", "swaps_in", "host_hit_tokens", "tokens", "kv_bytes_limit")
                stats[system] = {name: engine.stats()[name] for name in names}
    return seconds, stats


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--requests", type=int, default=8, help="side by side, or prefixes")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens of those side by side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = Plan(options.requests, options.prompt, options.output, options.rounds)
    model, _ = load_model(options.model, device="cpu")
    machine = schema.describe_machine("cpu", options.threads)
    for workload in WORKLOADS:
        seconds, stats = measure(model, plan, workload)
        gains = [slow / fast for slow, fast in zip(seconds[WITHOUT], seconds[WITH])]
        common = dict(benchmark="engine.offload", workload=workload, model=model.config._name_or_path, dtype="float32")
        rows = [
            schema.Measure(**common, system=name, metric="time", unit="s", samples=taken, detail=vars(plan) | stats[name])
            for name, taken in seconds.items()
        ]
        rows.append(schema.Measure(**common, system=WITH, metric="speed-up", unit="1", samples=gains, baseline=WITHOUT))
        schema.append_rows(options.out / "offload.csv", rows, machine)
        print(f"{workload:12}{median(seconds[WITHOUT]):8.2f} s without, {median(seconds[WITH]):8.2f} s with: "
              f"{median(gains):5.2f} times; {stats}")  # fmt: skip


if __name__ == "__main__":
    main()
