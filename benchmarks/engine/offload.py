"""A KV cache that is too small: with host memory behind it, without, and one with room for everything as the bound.

    python benchmarks/run.py engine.offload

- prefixes  prompts that begin with one of several prefixes, in turn; the cache holds half of the prefixes
- long      short prompts with long outputs, all at once; the cache holds two thirds of what they come to, so that as they
            grow the last third of them is preempted
- urgent    long prompts with long outputs, which fill the cache; now and then comes an urgent prompt that takes the place of one

The systems take turns, each in an engine of its own that has run before. Tokens of all are compared. Latencies are from a
request's arrival to its end.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.hf.build import load_model

from .. import schema

HOST, NONE, ROOM = "host memory", "none", "room for all"
BLOCK = 16
URGENT_TOKENS = 8  # put out for one


@dataclass(frozen=True)
class Plan:
    """Sizes of the work. `requests` are side by side, or prefixes; prompts and outputs in tokens; an urgent one comes every
    `every` steps.
    """

    requests: int
    prompt: int
    output: int
    every: int

    @property
    def short(self) -> int:
        return max(1, self.prompt // 8)


@dataclass
class Outcome:
    """What the requests of one run got.

    Attributes:
        tokens: of every request, in the order they came.
        seconds: all of it took.
        latencies: seconds, of those whose latency counts.
        computed: tokens that a cache with room for all, and no hits, would compute.
    """

    tokens: list[list[int]]
    seconds: float
    latencies: list[float]
    computed: int


def prompts(plan: Plan, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(plan.requests)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def outcome(outputs: list, counted: list | None = None) -> Outcome:
    timed = [output.metrics for output in (outputs if counted is None else counted)]
    seconds = max(output.metrics.finished for output in outputs) - min(output.metrics.arrival for output in outputs)
    tokens = [output.outputs[0].token_ids for output in outputs]
    # the last token of a request is put out and never computed
    computed = sum(len(output.prompt_token_ids) for output in outputs) + sum(map(len, tokens)) - len(tokens)
    return Outcome(tokens, seconds, [one.finished - one.arrival for one in timed], computed)


def prefixes(engine: Engine, plan: Plan) -> Outcome:
    """One prompt after another, each with a few tokens of its own after its prefix; the second time around counts."""
    jobs = prompts(plan, plan.prompt, engine.model.vocab_size)
    for job in jobs:
        engine.generate([job + [5, 7, 9]], greedy(2))
    engine.reset_stats()
    return outcome([engine.generate([job + [6, 8]], greedy(2))[0] for job in jobs])


def long(engine: Engine, plan: Plan) -> Outcome:
    return outcome(engine.generate(prompts(plan, plan.short, engine.model.vocab_size), greedy(plan.output)))


def urgent(engine: Engine, plan: Plan) -> Outcome:
    """The latencies are those of the long ones, which have to give way."""
    vocabulary = engine.model.vocab_size
    slow = [engine.add(job, greedy(plan.output), priority=1) for job in prompts(plan, plan.prompt, vocabulary)]
    coming = prompts(plan, plan.prompt, vocabulary, seed=1)
    fast, finished, steps = [], {}, 0
    while coming or engine.has_unfinished():
        steps += 1
        if coming and steps % plan.every == 0:
            fast.append(engine.add(coming.pop(), greedy(URGENT_TOKENS), priority=0))
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    outputs = [finished[request_id] for request_id in [*slow, *fast]]
    return outcome(outputs, outputs[: len(slow)])


@dataclass(frozen=True)
class Workload:
    """`memory(plan)`: tokens that the small cache has room for, and all there will be."""

    run: Callable[[Engine, Plan], Outcome]
    memory: Callable[[Plan], tuple[int, int]]


WORKLOADS = {
    "prefixes": Workload(prefixes, lambda plan: _shares(plan.requests * (plan.prompt + BLOCK), 1 / 2)),
    "long": Workload(long, lambda plan: _shares(plan.requests * (plan.short + plan.output), 2 / 3)),
    "urgent": Workload(urgent, lambda plan: _shares((plan.requests + 2) * (plan.prompt + plan.output), 2 / 3)),
}


def _shares(tokens: int, share: float) -> tuple[int, int]:
    return int(tokens * share), 2 * tokens


def run(model, plan: Plan, workload: str, system: str) -> tuple[Outcome, dict]:
    """(what came of it, the engine's numbers)."""
    small, all_of_it = WORKLOADS[workload].memory(plan)
    with Engine(model, config=EngineConfig(block_size=BLOCK)) as engine:
        per_token = engine._cache.bytes_per_token
    config = EngineConfig(
        block_size=BLOCK,
        kv_cache_memory=int(per_token * (all_of_it if system == ROOM else small)),
        offload=int(per_token * all_of_it) if system == HOST else None,
        max_num_seqs=2 * plan.requests,
        policy="priority",
    )
    with Engine(model, config=config) as engine:
        engine.generate([[5] * plan.prompt], greedy(2))
        engine.reset_stats()
        return WORKLOADS[workload].run(engine, plan), engine.stats()


def rows_of(workload: str, system: str, taken: list[float], found: list[Outcome], told: dict, **common) -> list[schema.Measure]:
    num_tokens = sum(map(len, found[0].tokens))
    p95 = [schema.quantile(one.latencies, 0.95) for one in found]
    counts = {name: told[name] for name in ("preemptions", "swaps_out", "swaps_in", "host_hit_tokens", "kv_bytes_limit")}
    counts["computed_again"] = max(0, told["tokens"] - found[0].computed)
    counts["bytes_copied"] = told.get("host_bytes_out", 0) + told.get("host_bytes_back", 0)
    print(f"{workload:10}{system:14}{median(taken):7.2f} s {num_tokens / median(taken):7.1f} tokens/s, p95 {median(p95):6.2f} s; "
          f"{counts}", flush=True)  # fmt: skip
    common |= dict(workload=workload, system=system)
    return [
        schema.Measure(**common, metric="time", unit="s", samples=taken, detail=counts),
        schema.Measure(**common, metric="tokens", unit="1/s", samples=[num_tokens / value for value in taken]),
        schema.Measure(**common, metric="latency p95", unit="s", samples=p95),
    ]


def measure(model, plan: Plan, workload: str, rounds: int) -> list[schema.Measure]:
    seconds: dict[str, list[float]] = {ROOM: [], HOST: [], NONE: []}
    found: dict[str, list[Outcome]] = {name: [] for name in seconds}
    told: dict[str, dict] = {}
    expected = None
    for _ in range(rounds):
        for system in seconds:
            came, told[system] = run(model, plan, workload, system)
            seconds[system].append(came.seconds)
            found[system].append(came)
            expected = expected or came.tokens
            assert came.tokens == expected, f"{workload}: other tokens with {system}"
    common = dict(benchmark="engine.offload", model=model.config._name_or_path, dtype="float32")
    rows = []
    for system in seconds:
        rows += rows_of(workload, system, seconds[system], found[system], told[system], **common)
    for system in (HOST, ROOM):
        gains = [slow / fast for slow, fast in zip(seconds[NONE], seconds[system])]
        rows.append(schema.Measure(**common, workload=workload, system=system, metric="speed-up", unit="1", samples=gains, baseline=NONE))
        print(f"{workload:10}{system:14}{median(gains):5.2f} times none ({min(gains):.2f} to {max(gains):.2f})", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--requests", type=int, default=6, help="side by side, or prefixes")
    parser.add_argument("--prompt", type=int, default=192, help="tokens")
    parser.add_argument("--output", type=int, default=96, help="tokens")
    parser.add_argument("--every", type=int, default=10, help="steps from one urgent request to the next")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = Plan(options.requests, options.prompt, options.output, options.every)
    model, _ = load_model(options.model, device="cpu")
    machine = schema.describe_machine("cpu", options.threads)
    for workload in options.workloads:
        rows = measure(model, plan, workload, options.rounds)
        schema.replace_rows(options.out / "offload.csv", rows, machine)


if __name__ == "__main__":
    main()
