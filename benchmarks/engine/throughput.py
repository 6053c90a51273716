"""Whole workloads, and how many times faster hf_paged is than each way of stock's.

A round is: hf_paged on the whole workload, then a slice of it through stock one at a time, a slice through stock's padded
batches of 8, and the whole of it through stock's continuous batching. One more hf_paged run closes the last round, so every
stock run lies between two hf_paged runs and the round's ratio is taken against their mean. All slices together are the whole
workload, unless a smaller sample was asked for. Slices hold a like mix of lengths; requests are in random order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hf_paged.hf.patch import led

from . import systems, workload
from .continuous import run_continuous
from .options import Options
from .systems import BATCH, PAGED, STOCK_BATCH, STOCK_CONTINUOUS, STOCK_ONE, Difference, Run

STEADY_SEQS, STEADY_STEPS = 32, 24


def measure(bench) -> None:
    options = bench.options
    for name in options.workloads:
        work = options.work(name, bench.tokenizer)
        runs, orders = _rounds(bench, work)
        _add_rows(bench, work, runs, *_compare(bench, work, runs, orders))
    if PAGED in bench.systems and options.speculation is None:
        _measure_steps(bench)


def _rounds(bench, work: workload.Workload) -> tuple[dict[str, list[Run]], dict[str, list[list[int]]]]:
    """Every system's runs, and the indices of the requests of each."""
    options, everything = bench.options, list(range(len(work.requests)))
    runs: dict[str, list[Run]] = {name: [] for name in bench.systems}
    orders: dict[str, list[list[int]]] = {name: [] for name in runs}
    plan = _stock_plan(work, options)
    more = {"ignore_eos": True, "progress": bench.bar.update}

    def paged(turn: int) -> None:
        salt = f"{work.name}-{turn}"
        add(
            PAGED,
            everything,
            led(bench.paged, lambda engine: systems.run_paged(engine, work.requests, cache_salt=salt, **more)),
        )

    def add(system: str, indices: list[int], run: Run | None) -> None:
        if run is not None:
            runs[system].append(run)
            orders[system].append(indices)

    for turn in range(options.rounds):
        for system in list(runs):
            if system not in bench.systems:  # it failed
                continue
            bench.say(f"throughput, {work.name}, round {turn + 1} of {options.rounds}: {system}")
            if system == PAGED:
                paged(turn)
            elif system == STOCK_CONTINUOUS:
                run = bench.try_continuous("throughput", lambda: run_continuous(bench.stock, work.requests, **more))
                add(system, everything, run)
            else:
                indices = plan[system][turn]
                batch = BATCH if system == STOCK_BATCH else 1
                run = systems.run_stock(bench.stock, [work.requests[i] for i in indices], batch=batch, **more)
                add(system, indices, _rank_0s(run, options))
    if PAGED in runs and len(runs) > 1:
        paged(options.rounds)
    return {name: found for name, found in runs.items() if found}, orders


def _rank_0s(value, options: Options):
    """Rank 0's value, on all ranks."""
    holder = [value]
    if options.num_ranks > 1:
        torch.distributed.broadcast_object_list(holder, 0)
    return holder[0]


def _stock_plan(work: workload.Workload, options: Options) -> dict[str, list[list[int]]]:
    """The request indices of each round of stock's `generate`. Padded batches are always full ones."""
    count, rounds = len(work.requests), options.rounds
    size = -(-min(options.stock_sample or count, count) // rounds)
    batch_size = min(-(-size // BATCH) * BATCH, count)
    return {
        STOCK_ONE: workload.slices(work, rounds, size, seed=options.seed),
        STOCK_BATCH: workload.slices(work, rounds, batch_size, seed=options.seed + 1),
    }


def ratios(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """hf_paged's rate over stock's, one value per round: the mean of the runs before and after stock's."""
    paged = [run.rate for run in runs.get(PAGED, [])]
    if not paged:
        return {}
    return {
        system: [(paged[i] + paged[i + 1]) / 2 / run.rate for i, run in enumerate(stock_runs)]
        for system, stock_runs in runs.items()
        if system != PAGED
    }


def _compare(bench, work, runs, orders) -> tuple[dict[str, int], dict[str, list[Difference]]]:
    """How many requests of each system were compared with stock one at a time, and those that differ.

    Without one-at-a-time runs, the others are compared with the padded batches. hf_paged with rounded weights, which are its
    own, is not compared.
    """
    truth_system = STOCK_ONE if STOCK_ONE in runs else STOCK_BATCH
    if truth_system not in runs:
        return {}, {}
    truth = dict(_tokens(runs[truth_system], orders[truth_system]))
    compared, differences = {}, {}
    for system in runs:
        if system == truth_system or (system == PAGED and bench.options.quantization):
            continue
        pairs = [(index, got) for index, got in _tokens(runs[system], orders[system]) if index in truth]
        found = [
            systems.first_difference(bench.stock, index, work.requests[index], truth[index], got)
            for index, got in pairs
        ]
        compared[system], differences[system] = len(pairs), [difference for difference in found if difference]
    return compared, differences


def _tokens(runs: list[Run], orders: list[list[int]]):
    for indices, run in zip(orders, runs, strict=True):
        yield from zip(indices, run.tokens, strict=True)


def _add_rows(bench, work, runs, compared, differences) -> None:
    options = bench.options
    detail = {
        "requests": len(work.requests),
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        "fingerprint": work.fingerprint(),
        "seed": options.seed,
        "max_num_seqs": options.max_num_seqs,
        "speculation": options.speculation,
        "quantization": options.quantization,
    }
    if options.num_ranks > 1:
        detail |= {"ranks": options.num_ranks, "expert_parallel": options.expert_parallel}
    found = ratios(runs)
    for system, done in runs.items():
        here = {"workload": work.name, "system": system}
        more = detail | {"requests_run": sum(len(run.tokens) for run in done)}
        if system in compared:
            more |= {"compared": compared[system], "different": len(differences[system])}
            more |= (
                {"differences": [str(difference) for difference in differences[system][:8]]}
                if differences[system]
                else {}
            )
        bench.add(
            "throughput", **here, metric="output_tokens", unit="1/s", samples=[run.rate for run in done], detail=more
        )
        bench.add("throughput", **here, metric="kv_peak", unit="bytes", samples=[max(run.kv_bytes for run in done)])
        if system in found:
            ratio = here | {"system": PAGED, "baseline": system}
            bench.add("throughput", **ratio, metric="speedup", unit="ratio", samples=found[system])


def _measure_steps(bench) -> None:
    """32 requests, or as many as may run at once: prefilled, then decoding together. Where a step's time goes, token rates."""
    count = min(STEADY_SEQS, bench.options.max_num_seqs)
    requests = workload.mixed(bench.tokenizer, seed=bench.options.seed, count=count).requests
    bench.say(f"throughput, steps of {count} running requests: {PAGED}")
    stats, prefill, decode = led(bench.paged, lambda engine: _steady_decode(engine, requests))
    total = stats["time_total"]
    shares = {name: stats[f"time_{name}"] / total for name in ("model", "schedule", "build", "sample", "detokenize")}
    shares["other"] = 1 - sum(shares.values())
    for metric, unit, value, detail in (
        ("own_time", "share", 1 - shares["model"], {name: round(share, 4) for name, share in shares.items()}),
        ("decode_tokens", "1/s", count * STEADY_STEPS / decode, {}),
        ("prefill_tokens", "1/s", sum(len(request.prompt) for request in requests) / prefill, {}),
    ):
        more = dict(workload=f"{count} running", system=PAGED, metric=metric, unit=unit, samples=[value], detail=detail)
        bench.add("throughput", **more)


def _steady_decode(engine, requests: Sequence[workload.Request]) -> tuple[dict, float, float]:
    """Stats of steps in which every request decodes one token; seconds of the steps before, and of these."""
    params = systems.greedy(4 * STEADY_STEPS + 64, ignore_eos=True)
    waiting = {engine.add(list(request.prompt), params, cache_salt="steps") for request in requests}
    running = set(waiting)
    start = time.perf_counter()
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    prefill = time.perf_counter() - start
    engine.reset_stats()
    start = time.perf_counter()
    for _ in range(STEADY_STEPS):
        engine.step()
    seconds, stats = time.perf_counter() - start, engine.stats()
    for request_id in running:
        engine.abort(request_id)
    return stats, prefill, seconds
