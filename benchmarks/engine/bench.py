"""`hf-paged bench`: stock `generate` and hf_paged interleaved in one run on the same machine, model and requests.

A round is: hf_paged on the whole workload, then a slice of it through stock one at a time, then a slice through stock
padded batches of 8. One more hf_paged run closes the last round, so every stock slice lies between two hf_paged runs
and the round's ratio is taken against their mean. All slices together are the whole workload, unless a smaller sample
was asked for. Slices hold a like mix of lengths; one-at-a-time and padded batches see requests in random order.

On several ranks all of them do the same: stock runs sharded by the same plan, hf_paged's engine is rank 0's. Times are
those of rank 0, which prints and writes; bytes are those of one rank.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import hf_paged
from hf_paged.benchmarks import schema
from hf_paged.hf.build import load_model
from hf_paged.hf.patch import led
from hf_paged.hf.quantize.spot import check_kind

from . import systems, workload
from .report import draw_chart, print_report
from .systems import BATCH, PAGED, STOCK_BATCH, STOCK_ONE, Difference, Run

SYSTEMS = {"paged": PAGED, "one": STOCK_ONE, "batch": STOCK_BATCH}
WORKLOADS = {name: getattr(workload, name) for name in ("mixed", "shared", "chat", "long")}
BOTH = "mixed", "shared"  # what is run by default
PROFILE_SEQS, PROFILE_STEPS = 32, 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run. `stock_sample` is how many requests stock runs over all rounds (None: the whole workload).

    `workloads` are names of WORKLOADS or paths of traces (see `workload.from_trace`). `profile` is a file for a Chrome
    trace of the engine's steps in one run of each of them.

    `requests` is how many a workload has (None: its own number), `rank` which of `num_ranks` processes this is.
    """

    model: str | None = None
    workloads: Sequence[str] = BOTH
    systems: Sequence[str] = tuple(SYSTEMS)
    rounds: int = 4
    stock_sample: int | None = None
    requests: int | None = None
    max_num_seqs: int = 64
    speculation: str | None = None
    quantization: str | None = None
    threads: int = 2
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    rank: int = 0
    num_ranks: int = 1
    expert_parallel: bool = False
    out: Path = field(default_factory=schema.results_folder)
    profile: Path | None = None

    def __post_init__(self):
        for value in self.workloads:
            if value not in WORKLOADS and not _is_trace(value):
                raise ValueError(f"workloads has no {value!r}; there are {', '.join(WORKLOADS)}, and paths of *.jsonl")
        for value in self.systems:
            if value not in SYSTEMS:
                raise ValueError(f"systems has no {value!r}; there are {', '.join(SYSTEMS)}")
        if self.profile is not None and ("paged" not in self.systems or self.num_ranks > 1):
            raise ValueError("profile is of the system paged, in one process")
        if self.speculation not in (None, "ngram"):
            raise ValueError(f"speculation must be ngram or left out, got {self.speculation!r}")
        check_kind(self.quantization)
        for name in ("rounds", "threads", "max_num_seqs", "stock_sample", "requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def work(self, name: str, tokenizer) -> workload.Workload:
        count = {} if self.requests is None else {"count": self.requests}
        make = partial(workload.from_trace, name) if _is_trace(name) else WORKLOADS[name]
        return make(tokenizer, seed=self.seed, **count)


def _is_trace(name: str) -> bool:
    return name.endswith(".jsonl")


@dataclass
class Result:
    """All runs of one workload. `ratios[system]` has one value per round."""

    work: workload.Workload
    runs: dict[str, list[Run]]
    ratios: dict[str, list[float]]
    compared: dict[str, int]
    differences: dict[str, list[Difference]]


@dataclass(frozen=True)
class Profile:
    """The engine at some running requests, 32 unless there are fewer: where a step's time goes, token rates, KV memory."""

    running: int
    own_share: float
    shares: dict[str, float]
    decode_rate: float
    prefill_rate: float
    kv_bytes: int
    static_bytes: int
    preemptions: int


def run_bench(options: Options) -> tuple[list[Result], Profile | None]:
    """Measure, print the report, append to engine.csv and draw engine.png in `options.out`."""
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        stock, paged_model, tokenizer = _load(options)
        works = [options.work(name, tokenizer) for name in options.workloads]
        for work in works if not options.rank else ():
            print(
                f"{work.name}: {len(work.requests)} requests, {work.prompt_tokens} prompt and {work.output_tokens} "
                f"output tokens, fingerprint {work.fingerprint()}"
            )
        profile = None
        if "paged" in options.systems:
            with _patched(paged_model, tokenizer, PROFILE_SEQS, options.quantization):
                _warm_up(paged_model, works[0])
                profile = _profile(paged_model, stock, options.work("mixed", tokenizer))
            more = options.quantization, options.speculation
            stack.enter_context(_patched(paged_model, tokenizer, options.max_num_seqs, *more))
            _warm_up(paged_model, works[0])
            if options.profile is not None:
                _write_trace(hf_paged.engine_of(paged_model), works, options.profile)
        results = [_measure(work, stock, paged_model, options) for work in works]
    if options.rank:
        return results, profile
    machine = schema.describe_machine(_device_name(stock), torch.get_num_threads())
    measures = _measures(results, profile, options, str(getattr(stock.config, "_name_or_path", "")))
    schema.append_rows(options.out / "engine.csv", measures, machine)
    chart = draw_chart(results, machine, options.out / "engine.png")
    print_report(results, profile, machine)
    print(f"rows appended to {options.out / 'engine.csv'}" + (f", chart in {chart}" if chart else ""))
    return results, profile


def _write_trace(engine, works: list[workload.Workload], path: Path) -> None:
    """Of one run of every workload, beside what is measured."""
    with engine.trace(path):
        for work in works:
            systems.run_paged(engine, work.requests, ignore_eos=True, cache_salt=f"trace-{work.name}")
    print(f"Chrome trace of the engine's steps in {path}")


def _load(options: Options):
    """A stock model, a second one to be patched, and their tokenizer."""
    loading = {"dtype": getattr(torch, options.dtype), "device": options.device}
    loading |= {"num_ranks": options.num_ranks, "expert_parallel": options.expert_parallel, "progress": not options.rank}
    stock, tokenizer = load_model(options.model, **loading)
    paged_model = load_model(options.model, **loading)[0] if "paged" in options.systems else None
    return stock, paged_model, tokenizer


@contextmanager
def _patched(model, tokenizer, max_num_seqs: int, quantization: str | None, speculation: str | None = None):
    options = {"max_num_seqs": max_num_seqs, "speculation": speculation}
    hf_paged.patch(model, tokenizer=tokenizer, quantization=quantization, **options)
    try:
        yield
    finally:
        hf_paged.unpatch(model)


def _warm_up(model, work: workload.Workload) -> None:
    """Compile kernels and touch memory outside the measured time."""
    led(model, lambda engine: systems.run_paged(engine, work.requests[:8], ignore_eos=True, cache_salt="warm-up"))


def _measure(work: workload.Workload, stock, paged_model, options: Options) -> Result:
    runs: dict[str, list[Run]] = {SYSTEMS[name]: [] for name in SYSTEMS if name in options.systems}
    stock_runs: dict[str, list[list[int]]] = {name: [] for name in runs if name != PAGED}
    plan = _stock_plan(work, options)
    total = _total_tokens(work, plan, options)
    with tqdm(total=total, unit="tok", smoothing=0.1, file=sys.stderr, disable=bool(options.rank)) as bar:

        def paged(turn: int) -> None:
            bar.set_description(f"{work.name}: {PAGED}")
            more = {"ignore_eos": True, "cache_salt": f"{work.name}-{turn}", "progress": bar.update}
            runs[PAGED].append(led(paged_model, lambda engine: systems.run_paged(engine, work.requests, **more)))

        def stock_slice(system: str, batch: int, indices: list[int]) -> None:
            bar.set_description(f"{work.name}: {system}")
            chosen = [work.requests[i] for i in indices]
            run = systems.run_stock(stock, chosen, batch=batch, ignore_eos=True, progress=bar.update)
            runs[system].append(_rank_0s(run, options))
            stock_runs[system].append(indices)

        for turn in range(options.rounds):
            if PAGED in runs:
                paged(turn)
            for system, batch in ((STOCK_ONE, 1), (STOCK_BATCH, BATCH)):
                if system in runs:
                    stock_slice(system, batch, plan[system][turn])
        if PAGED in runs and stock_runs:
            paged(options.rounds)
    compared, differences = _compare(work, stock, runs, stock_runs, skip={PAGED} if options.quantization else set())
    return Result(work, runs, _ratios(runs), compared, differences)


def _rank_0s(value, options: Options):
    """Rank 0's value, on all ranks."""
    holder = [value]
    if options.num_ranks > 1:
        torch.distributed.broadcast_object_list(holder, 0)
    return holder[0]


def _stock_plan(work: workload.Workload, options: Options) -> dict[str, list[list[int]]]:
    """The request indices of each stock system in each round. Padded batches are always full ones."""
    count, rounds = len(work.requests), options.rounds
    sample = min(options.stock_sample or count, count)
    size = -(-sample // rounds)
    batch_size = min(-(-size // BATCH) * BATCH, count)
    plan = {
        STOCK_ONE: workload.slices(work, rounds, size, seed=options.seed),
        STOCK_BATCH: workload.slices(work, rounds, batch_size, seed=options.seed + 1),
    }
    return {name: plan[name] for name in plan if name in {SYSTEMS[key] for key in options.systems}}


def _total_tokens(work: workload.Workload, plan: dict[str, list[list[int]]], options: Options) -> int:
    stock = sum(work.requests[i].max_new_tokens for parts in plan.values() for part in parts for i in part)
    paged_runs = options.rounds + bool(plan) if "paged" in options.systems else 0
    return stock + paged_runs * work.output_tokens


def _ratios(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """hf_paged's rate over stock's, one value per round: the mean of the runs before and after stock's."""
    paged = [run.rate for run in runs.get(PAGED, [])]
    if not paged:
        return {}
    return {
        system: [(paged[i] + paged[i + 1]) / 2 / run.rate for i, run in enumerate(stock_runs)]
        for system, stock_runs in runs.items()
        if system != PAGED
    }


def _compare(work, stock, runs, stock_runs, skip: set[str]) -> tuple[dict[str, int], dict[str, list[Difference]]]:
    """How many requests of each system were compared with stock one at a time, and those that differ.

    Without one-at-a-time runs, hf_paged is compared with the padded batches. Systems in `skip`, which have weights of
    their own, are not compared.
    """
    truth_system = STOCK_ONE if STOCK_ONE in runs else STOCK_BATCH
    if truth_system not in runs:
        return {}, {}
    truth = {
        index: tokens
        for indices, run in zip(stock_runs[truth_system], runs[truth_system], strict=True)
        for index, tokens in zip(indices, run.tokens, strict=True)
    }
    compared, differences = {}, {}
    for system in runs:
        if system == truth_system or system in skip:
            continue
        everything = range(len(work.requests))
        orders = stock_runs.get(system) or [everything] * len(runs[system])
        pairs = [
            (index, tokens)
            for indices, run in zip(orders, runs[system], strict=True)
            for index, tokens in zip(indices, run.tokens, strict=True)
            if index in truth
        ]
        found = [
            systems.first_difference(stock, index, work.requests[index], truth[index], tokens)
            for index, tokens in pairs
        ]
        compared[system], differences[system] = len(pairs), [difference for difference in found if difference]
    return compared, differences


def _profile(model, stock, mixed: workload.Workload) -> Profile:
    """The first 32 mixed requests: all prefilled, then decoding together, then run to their end for the memory."""
    requests = mixed.requests[:PROFILE_SEQS]

    def work(engine):
        prompts = [workload.Request(r.prompt, 1) for r in requests]
        prefill = systems.run_paged(engine, prompts, ignore_eos=True, cache_salt="profile-prefill")
        whole = systems.run_paged(engine, mixed.requests, ignore_eos=True, cache_salt="profile-memory")
        return prefill, whole, engine.stats()["preemptions"], _steady_decode(engine, requests)

    prefill, whole, preemptions, (stats, seconds) = led(model, work)
    total = stats["time_total"]
    parts = ("schedule", "build", "sample", "detokenize")
    shares = {"model": stats["time_model"] / total} | {name: stats[f"time_{name}"] / total for name in parts}
    shares["other"] = 1 - sum(shares.values())
    return Profile(
        running=len(requests),
        own_share=1 - shares["model"],
        shares=shares,
        decode_rate=len(requests) * PROFILE_STEPS / seconds,
        prefill_rate=sum(len(r.prompt) for r in requests) / prefill.seconds,
        kv_bytes=whole.kv_bytes,
        static_bytes=systems.static_batch_bytes(systems.kv_bytes_per_token(stock), mixed.requests, PROFILE_SEQS),
        preemptions=preemptions,
    )


def _steady_decode(engine, requests: Sequence[workload.Request]) -> tuple[dict, float]:
    """Stats and seconds of steps in which every request decodes one token."""
    room = 4 * PROFILE_STEPS + 64
    params = systems.greedy(room, ignore_eos=True)
    waiting = {engine.add(list(r.prompt), params, cache_salt="profile-decode") for r in requests}
    running = set(waiting)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    engine.reset_stats()
    start = time.perf_counter()
    for _ in range(PROFILE_STEPS):
        engine.step()
    seconds, stats = time.perf_counter() - start, engine.stats()
    for request_id in running:
        engine.abort(request_id)
    return stats, seconds


def _device_name(model) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type


def _measures(results: list[Result], profile: Profile | None, options: Options, model: str) -> list[schema.Measure]:
    common = {"benchmark": "engine", "model": model, "dtype": options.dtype}
    rows = []
    for result in results:
        detail = {
            "requests": len(result.work.requests),
            "prompt_tokens": result.work.prompt_tokens,
            "output_tokens": result.work.output_tokens,
            "fingerprint": result.work.fingerprint(),
            "seed": options.seed,
            "max_num_seqs": options.max_num_seqs,
            "speculation": options.speculation,
            "quantization": options.quantization,
        }
        if options.num_ranks > 1:
            detail |= {"ranks": options.num_ranks, "expert_parallel": options.expert_parallel}
        for system, runs in result.runs.items():
            here = common | {"workload": result.work.name, "system": system}
            equal = (
                {"compared": result.compared[system], "different": len(result.differences[system])}
                if system in result.compared
                else {}
            )
            stock_requests = {"requests_run": sum(len(run.tokens) for run in runs)}
            more = detail | equal | stock_requests
            rates = [run.rate for run in runs]
            rows.append(schema.Measure(**here, metric="output_tokens", unit="1/s", samples=rates, detail=more))
            kv = [max(run.kv_bytes for run in runs)]
            rows.append(schema.Measure(**here, metric="kv_peak", unit="bytes", samples=kv))
        for system, ratios in result.ratios.items():
            here = common | {"workload": result.work.name, "system": PAGED, "baseline": system}
            rows.append(schema.Measure(**here, metric="speedup", unit="ratio", samples=ratios))
    if profile:
        here = common | {"workload": f"{profile.running} running", "system": PAGED}
        for metric, unit, value in (
            ("own_time", "share", profile.own_share),
            ("decode_tokens", "1/s", profile.decode_rate),
            ("prefill_tokens", "1/s", profile.prefill_rate),
            ("kv_peak", "bytes", profile.kv_bytes),
            ("kv_static_batch", "bytes", profile.static_bytes),
        ):
            detail = {k: round(v, 4) for k, v in profile.shares.items()} if metric == "own_time" else {}
            rows.append(schema.Measure(**here, metric=metric, unit=unit, samples=[value], detail=detail))
    return rows
