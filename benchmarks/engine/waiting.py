"""The waiting queue: requests that share prefixes when the cache cannot hold them all, and what a long queue costs.

    python benchmarks/run.py engine.waiting

- prefixes  requests of several long prefixes come in turns; the cache holds some of the prefixes. With requests of a cached
            prefix going first, and without; the tokens are compared.
- queue     the time of `schedule` alone, beside 100 and beside 10 000 waiting requests, under each policy.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.core.groups import GroupSpec
from hf_paged.core.overtaking import Overtaking
from hf_paged.core.request import Request
from hf_paged.core.scheduler import Scheduler
from hf_paged.hf.build import load_model

from .. import schema

POLICIES = ("fcfs", "priority", "fair")
SHORT, LONG = 100, 10_000  # waiting requests


def prefixes(model, tokenizer, rounds: int, *, families: int, each: int, length: int) -> list[schema.Measure]:
    """`families` prefixes of `length` tokens, `each` requests of every one of them; half the prefixes fit."""
    draw = torch.Generator().manual_seed(0)
    heads = torch.randint(3, min(model.config.vocab_size, 20_000), (families, length), generator=draw).tolist()
    prompts = [[*head, 5 + number, 9] for number in range(each) for head in heads]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    in_turns = mock.patch.object(Overtaking, "choose", lambda self, step, head, before: head)
    systems = {"together": contextlib.nullcontext(), "as they come": in_turns}
    found: dict[str, list[float]] = {name: [] for name in systems}
    hits: dict[str, int] = {}
    config = EngineConfig(max_num_seqs=families, max_model_len=2 * length)
    with Engine(model, tokenizer, config) as engine:
        engine.generate(prompts[:1], params)
        per_token = engine.stats()["kv_bytes_peak"] / (-(-(length + 5) // 16) * 16)
        engine.resize_kv_cache(int(per_token * length * (families / 2 + 1)))
        for _ in range(rounds):
            tokens = []
            for name, context in systems.items():
                engine.reset_prefix_cache()
                engine.reset_stats()
                with context:
                    started = time.perf_counter()
                    outputs = engine.generate(prompts, params)
                    found[name].append(time.perf_counter() - started)
                tokens.append([output.outputs[0].token_ids for output in outputs])
                hits[name] = engine.stats()["prefix_hit_tokens"]
            assert tokens[0] == tokens[1], "other tokens"
    total = sum(map(len, prompts))
    name = model.config._name_or_path
    shared = dict(benchmark="waiting", workload=f"{families} prefixes", model=name, dtype=str(model.dtype))
    measures = []
    for name, seconds in found.items():
        told = f"{hits[name]:6} of {total} prompt tokens from the cache, {median(seconds):.1f} s"
        print(f"prefixes {name:12}  {told}", flush=True)
        detail, share = dict(requests=len(prompts), prefix=length), 100 * hits[name] / total
        measures += [
            schema.Measure(**shared, system=name, metric="time", unit="s", samples=seconds, detail=detail),
            schema.Measure(**shared, system=name, metric="cached prompt tokens", unit="%", samples=[share]),
        ]
    ratios = [slow / fast for fast, slow in zip(*found.values())]
    print(f"prefixes: {median(ratios):.1f} times faster together ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)
    return [
        *measures,
        schema.Measure(
            **shared, system="together", metric="speed-up", unit="x", samples=ratios, baseline="as they come"
        ),
    ]


def queue(policy: str, waiting: int, users: int) -> list[float]:
    """CPU seconds of `schedule`, step by step, with so many waiting all the while."""
    scheduler = Scheduler(
        groups=[GroupSpec()],
        block_size=16,
        num_blocks=[64],
        max_blocks=[64 * 40],
        max_batch_tokens=2048,
        max_num_seqs=64,
        max_model_len=4096,
        policy=policy,
    )

    def add(number: int) -> None:
        prompt = [number % 97] * 400 + [number] * 100
        user = f"user {number % users}"
        scheduler.add(Request(request_id=str(number), prompt_token_ids=prompt, max_tokens=20, user=user))

    count, seconds = 0, []
    for _ in range(200):
        while scheduler.num_waiting < waiting:
            add(count)
            count += 1
        started = time.thread_time()
        plan = scheduler.schedule()
        seconds.append(time.thread_time() - started)
        scheduler.commit(plan, {seq_id: [7] for _, seq_id in plan.samples})
    return seconds[20:]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4, help="of each prefix")
    parser.add_argument("--length", type=int, default=384, help="of a prefix, in tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measures = []
    for policy in POLICIES:
        for waiting in (SHORT, LONG):
            seconds = queue(policy, waiting, users=100)
            print(f"queue    {policy:9} {waiting:6} waiting: {1e3 * median(seconds):.2f} ms a step", flush=True)
            shared = dict(benchmark="waiting", workload=f"{waiting} waiting", system=policy)
            measures.append(schema.Measure(**shared, metric="schedule", unit="s", samples=seconds))
    model, tokenizer = load_model(options.model, progress=False)
    sizes = dict(families=options.prefixes, each=options.requests, length=options.length)
    measures += prefixes(model, tokenizer, options.rounds, **sizes)
    machine = schema.describe_machine(str(model.device), options.threads)
    schema.append_rows(options.out / "waiting.csv", measures, machine)


if __name__ == "__main__":
    main()
