"""Jobs of every kind in one queue, against the same jobs one kind after another.

    python benchmarks/run.py hetero.mixed

Five kinds: chats, extraction of JSON by a schema, users of LoRA adapters, embeddings, and multiple choice by scores. In
turns, on one engine, with prompts that no cached prefix knows:

- mixed     all jobs are there from the beginning, and run in the same steps; the short ones have priority
- in turn   one kind after another, all of its jobs at once: batches of equal requests

A job's latency is counted from when the engine got it: in turn, from the beginning of its own kind's batch, as if the
others were not there. Before the clock starts it is checked that both give the same results.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hf_paged import EmbeddingOutput, EmbedParams, Engine, EngineConfig, SamplingParams, ScoreParams
from hf_paged.benchmarks.engine import workload
from hf_paged.hf.build import load_model

from .. import schema
from .adapters import make_adapters
from .common import finish, parser_of

MIXED, TURNS = "mixed", "in turn"
FIRST, SECOND, THIRD = 0, 1, 2  # priorities
STEP_TOKENS = 128  # of prompts, at most: what has priority does not wait for what has none
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["statement", "expression", "type", "other"]},
        "examples": {"type": "array", "items": {"type": "integer"}, "minItems": 48, "maxItems": 48},
        "deprecated": {"type": "boolean"},
    },
    "required": ["title", "kind", "examples", "deprecated"],
}


@dataclass(frozen=True)
class Job:
    """What somebody wants: one or several requests, done when the last of them is.

    Attributes:
        requests: (prompt token ids, parameters).
    """

    kind: str
    requests: tuple[tuple[list[int], object], ...]
    priority: int = THIRD
    adapter: str | None = None


@dataclass(frozen=True)
class Plan:
    """Sizes of the work, in tokens. `jobs`: of each kind that generates; there are twice as many of the others."""

    jobs: int = 2
    prompt: int = 24
    output: int = 192
    rank: int = 16
    choices: int = 4


@dataclass(frozen=True)
class Run:
    """Seconds it took, seconds of each job, and what came out, both in the jobs' order."""

    seconds: float
    latencies: list[float]
    results: list[list]


def make_jobs(tokenizer, plan: Plan, adapters: list[str]) -> list[Job]:
    """All jobs, kind by kind."""
    draw = random.Random(0)
    greedy = SamplingParams(temperature=0, max_tokens=plan.output, min_tokens=plan.output)
    form = dict(json=SCHEMA, disable_any_whitespace=True)
    extraction = SamplingParams(temperature=0, max_tokens=plan.output, structured_outputs=form)

    def some(size: int) -> list[int]:
        return list(workload.piece(tokenizer, max(4, round(size * draw.uniform(0.5, 1.5))), draw))

    def choose() -> tuple:
        question = some(plan.prompt)
        return tuple((question, ScoreParams(continuation=some(8))) for _ in range(plan.choices))

    kinds = {
        "chat": lambda place: Job("chat", ((some(plan.prompt), greedy),)),
        "JSON": lambda place: Job("JSON", ((some(plan.prompt), extraction),)),
        "LoRA": lambda place: Job("LoRA", ((some(plan.prompt), greedy),), adapter=adapters[place]),
        "embedding": lambda place: Job("embedding", ((some(plan.prompt), EmbedParams(pooling="mean")),), FIRST),
        "choice": lambda place: Job("choice", choose(), SECOND),
    }
    counts = {kind: plan.jobs * (2 if kind in ("embedding", "choice") else 1) for kind in kinds}
    return [make(place) for kind, make in kinds.items() for place in range(counts[kind])]


def run(engine: Engine, jobs: Iterable[Job], salt: str) -> Run:
    """All jobs at once, to their end."""
    jobs = list(jobs)
    started = time.perf_counter()
    owner = {}
    for place, job in enumerate(jobs):
        for prompt, params in job.requests:
            options = dict(priority=job.priority, adapter=job.adapter, cache_salt=salt)
            owner[engine.add(prompt, params, **options)] = place
    ended, outputs = [0.0] * len(jobs), {}
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                if output.error is not None:
                    raise output.error
                ended[owner[output.request_id]] = time.perf_counter() - started
                outputs[output.request_id] = output
    results = [[] for _ in jobs]
    for request_id, place in owner.items():
        results[place].append(_result(outputs[request_id]))
    return Run(max(ended), ended, results)


def _result(output):
    if output.result is None:
        return output.outputs[0].token_ids
    return output.result.embedding if isinstance(output.result, EmbeddingOutput) else output.result.logprob


def in_turn(engine: Engine, jobs: list[Job], salt: str) -> Run:
    """One kind after another."""
    parts = [run(engine, (job for job in jobs if job.kind == kind), salt) for kind in kinds_of(jobs)]
    together = lambda name: [value for part in parts for value in getattr(part, name)]  # noqa: E731
    return Run(sum(part.seconds for part in parts), together("latencies"), together("results"))


def kinds_of(jobs: list[Job]) -> list[str]:
    return list(dict.fromkeys(job.kind for job in jobs))


def check(mixed: Run, turns: Run) -> None:
    """Raise if the two gave different results."""
    for mine, its in zip(mixed.results, turns.results, strict=True):
        for one, other in zip(mine, its, strict=True):
            same = one == other if isinstance(one, list) else np.allclose(one, other, rtol=0, atol=1e-4)
            assert same, f"other results: {one} and {other}"


def measure(engine: Engine, jobs: list[Job], rounds: int) -> dict[str, list[Run]]:
    """Runs of both in every round, taking turns."""
    salts = map(str, count())
    systems = {MIXED: run, TURNS: in_turn}
    first = {name: execute(engine, jobs, next(salts)) for name, execute in systems.items()}
    check(first[MIXED], first[TURNS])
    runs: dict[str, list[Run]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, execute in systems.items():
            runs[name].append(execute(engine, jobs, next(salts)))
    return runs


def report(runs: dict[str, list[Run]], jobs: list[Job], common: dict) -> list[schema.Measure]:
    """Rows of all that was measured, printed too."""
    rows = []
    for name, some in runs.items():
        rates = [len(jobs) / one.seconds for one in some]
        rows.append(schema.Measure(**common, system=name, metric="jobs", unit="1/s", samples=rates))
    gains = [turns.seconds / mixed.seconds for mixed, turns in zip(runs[MIXED], runs[TURNS])]
    rows.append(schema.Measure(**common, system=MIXED, metric="speed-up", unit="1", samples=gains, baseline=TURNS))
    best = {name: min(one.seconds for one in some) for name, some in runs.items()}
    print(f"{len(jobs)} jobs: mixed {best[MIXED]:.2f} s, in turn {best[TURNS]:.2f} s at best; {median(gains):.2f} times faster")
    for kind in kinds_of(jobs):
        places = [place for place, job in enumerate(jobs) if job.kind == kind]
        here = common | {"workload": f"{common['workload']}, {kind}"}
        tails = {name: _tail(some, places) for name, some in runs.items()}
        for name, value in tails.items():
            rows.append(schema.Measure(**here, system=name, metric="latency_p95", unit="s", samples=[value]))
        longer = tails[MIXED] / tails[TURNS]
        rows.append(schema.Measure(**here, system=MIXED, metric="latency_p95", unit="1", samples=[longer], baseline=TURNS))
        print(f"{kind:10} p95 mixed {tails[MIXED]:.2f} s, alone {tails[TURNS]:.2f} s: {longer:.2f} times")
    return rows


def _tail(runs: list[Run], places: list[int]) -> float:
    """The 95th percentile of the jobs' latencies, each that of its best round: other work on the machine is left out."""
    return schema.quantile([min(one.latencies[place] for one in runs) for place in places], 0.95)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=3)
    for name in Plan.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = Plan(**{name: getattr(options, name) for name in Plan.__dataclass_fields__})
    rows = measured(options, plan)
    finish(rows, options, rows[0].workload)


def measured(options: argparse.Namespace, plan: Plan) -> list[schema.Measure]:
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(options.model, device="cpu")
        paths = make_adapters(model, plan.jobs, plan.rank, Path(folder))
        jobs = make_jobs(tokenizer, plan, list(paths))
        sequences = sum(len(job.requests) for job in jobs)
        config = EngineConfig(max_num_seqs=sequences, max_batch_tokens=max(STEP_TOKENS, sequences), policy="priority")
        with Engine(model, tokenizer, config) as engine:
            for name, path in paths.items():
                engine.load_adapter(name, path)
            runs = measure(engine, jobs, options.rounds)
    workload_name = f"{len(jobs)} jobs of {len(kinds_of(jobs))} kinds"
    common = dict(benchmark="hetero.mixed", workload=workload_name, model=model.config._name_or_path, dtype="float32")
    return report(runs, jobs, common | {"detail": vars(plan)})


if __name__ == "__main__":
    main()
