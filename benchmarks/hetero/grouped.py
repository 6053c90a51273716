"""Requests that share a long beginning: computed once or by each, and read once a step or by each.

    python benchmarks/run.py hetero.grouped

In turns, in one process, the requests decoded greedily by an engine of their own:

- grouped    one computes the beginning, the others find it in the prefix cache, and attention reads it once a step for all
             of them (left out with the reference kernels, which do not)
- cached     the same, but each reads it for itself
- no cache   each computes it, too; a sample of the requests, as that is slow

Rates are of output tokens, from the beginning to the end of all requests, and in the fastest step in which all decode.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import torch

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.benchmarks.engine import workload
from hf_paged.hf.build import load_model

from .. import schema
from .common import finish, parser_of, rows_of

GROUPED, CACHED, ALONE = "grouped", "cached", "no cache"


@dataclass(frozen=True)
class Run:
    """Seconds until all were done, the shortest step in which all decoded, and everybody's tokens."""

    seconds: float
    step: float
    tokens: list[list[int]]


def run(model, prompts: list[list[int]], output: int, system: str) -> Run:
    config = EngineConfig(max_num_seqs=max(2, len(prompts)), prefix_cache=system != ALONE)
    with Engine(model, config=config) as engine:
        if system == CACHED:  # no option of an engine's: grouping changes no result
            engine._runner.prefixes = None
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        started = time.perf_counter()
        ids = [engine.add(prompt, params) for prompt in prompts]
        tokens, shortest = {}, float("inf")
        while engine.has_unfinished():
            before = time.perf_counter()
            outputs = engine.step()
            if len(outputs) == len(ids) and all(len(one.outputs[0].token_ids) > 1 for one in outputs):
                shortest = min(shortest, time.perf_counter() - before)
            tokens.update({one.request_id: one.outputs[0].token_ids for one in outputs})
        return Run(time.perf_counter() - started, shortest, [tokens[request_id] for request_id in ids])


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=2)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--shared", type=int, default=2048, help="tokens of the beginning")
    parser.add_argument("--own", type=int, default=16, help="tokens of each request's own")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--sample", type=int, default=4, help="requests without the cache")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = measured(options)
    finish(rows, options, rows[0].workload, options.device)


def measured(options: argparse.Namespace) -> list[schema.Measure]:
    model, tokenizer = load_model(options.model, device=options.device)
    draw = random.Random(0)
    beginning = list(workload.piece(tokenizer, options.shared, draw))
    prompts = [beginning + list(workload.piece(tokenizer, options.own, draw)) for _ in range(options.requests)]
    work = {GROUPED: prompts, CACHED: prompts, ALONE: prompts[: options.sample]}
    with Engine(model) as engine:
        if engine._runner.prefixes is None:
            del work[GROUPED]
    runs: dict[str, list[Run]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, some in work.items():
            runs[name].append(run(model, some, options.output, name))
    if model.dtype == torch.float32:
        for name, (first, *_) in runs.items():
            assert first.tokens == runs[CACHED][0].tokens[: len(first.tokens)], f"other tokens: {name}"
    about = dict(requests=options.requests, shared=options.shared, own=options.own, output=options.output, sample=options.sample)
    workload_name = f"{options.requests} requests sharing {options.shared} tokens"
    common = dict(benchmark="hetero.grouped", model=model.config._name_or_path, dtype=str(model.dtype).removeprefix("torch."))
    common |= dict(workload=workload_name, detail=about)
    print("all steps")
    counts = {name: len(some) * options.output for name, some in work.items()}
    seconds = {name: [one.seconds for one in some] for name, some in runs.items()}
    rows = rows_of(seconds, counts, "output_tokens", CACHED, **common)
    print("a step in which all decode")
    counts = {name: len(some) for name, some in work.items()}
    seconds = {name: [one.step for one in some] for name, some in runs.items() if name != ALONE}  # fewer requests
    return rows + rows_of(seconds, counts, "decode_tokens", CACHED, **common)


if __name__ == "__main__":
    main()
