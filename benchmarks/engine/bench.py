"""`hf-paged bench`: stock transformers, hf_paged and other servers, in turns, in one run on one machine.

The parts, each a module: throughput of whole workloads, delays at rising rates and throughput at rising concurrency (`loads`),
memory and quantized weights (`memory`). What they measure becomes rows of engine.csv; tables and charts are made of rows only.

On several ranks all of them do the same: stock runs sharded by the same plan, hf_paged's engine is rank 0's. Times are
those of rank 0, which prints and writes; bytes are those of one rank.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

import hf_paged
from hf_paged.benchmarks import schema
from hf_paged.hf.build import default_model_folder, load_model
from hf_paged.hf.patch import led

from . import loads, memory, report, systems, throughput, workload
from .continuous import ContinuousFailed
from .options import SYSTEMS, Options
from .systems import PAGED, STOCK_CONTINUOUS


@dataclass
class Bench:
    """One run: the loaded models, and the rows there are so far.

    `stock` and `paged` are two models of the same weights; None if no system asked for needs one. `served` is what other
    servers call the model, `failed` says why a system no longer takes part.
    """

    options: Options
    tokenizer: object
    name: str
    stock: object = None
    paged: object = None
    served: dict[str, str] = field(default_factory=dict)
    rows: list[schema.Measure] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    bar: tqdm | None = None

    @property
    def systems(self) -> list[str]:
        """Names of the systems of this process that take part."""
        return [name for key, name in SYSTEMS.items() if key in self.options.systems and name not in self.failed]

    def say(self, what: str) -> None:
        """What is being measured now."""
        self.bar.set_description(what)

    def add(self, part: str, **measure) -> None:
        common = {"benchmark": f"engine.{part}", "model": self.name, "dtype": self.options.dtype}
        self.rows.append(schema.Measure(**common | measure))

    def try_continuous(self, part: str, run):
        """What `run` returns, or None with a row that says why, if stock's continuous batching cannot do it."""
        try:
            return run()
        except ContinuousFailed as error:
            self.failed[STOCK_CONTINUOUS] = str(error)
            self.bar.write(f"{STOCK_CONTINUOUS} is left out from here on: {error}", file=sys.stderr)
            more = dict(workload="all", system=STOCK_CONTINUOUS, metric="failed", unit="1", samples=[1])
            self.add(part, **more, detail={"reason": str(error).splitlines()[0][:300]})
            return None


def run_bench(options: Options) -> list[dict]:
    """Measure, append rows to engine.csv in `options.out`, draw charts and write and print the table.

    Returns the rows, as they are in the file.
    """
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    with ExitStack() as stack:
        bench = _load(options)
        bench.bar = stack.enter_context(tqdm(unit="tok", smoothing=0.1, file=sys.stderr, disable=bool(options.rank)))
        bench.say("warming up")
        if PAGED in bench.systems:
            stack.enter_context(_patched(bench))
        if options.systems:
            works = [options.work(name, bench.tokenizer) for name in options.workloads]
            _warm_up(bench, works[0].requests)
        if options.profile is not None:
            _write_trace(hf_paged.engine_of(bench.paged), works, options)
        machine, path = _machine(bench), options.out / "engine.csv"
        for part in options.parts:
            done = len(bench.rows)
            MEASURES[part](bench)
            if not options.rank:  # at once: what a run was able to do before it was cut off is kept
                schema.append_rows(path, bench.rows[done:], machine)
    if options.rank:
        return []
    rows = [{name: str(value) for name, value in row.row(machine).items()} for row in bench.rows]
    files = report.write_all(options.out, options.readme)
    print(report.markdown(rows))
    print(
        f"{(time.perf_counter() - begun) / 60:.1f} minutes; rows appended to {path}; made of it: {', '.join(map(str, files))}"
    )
    return rows


def _machine(bench: Bench) -> schema.Machine:
    device = bench.stock.device if bench.stock is not None else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return schema.describe_machine(name, torch.get_num_threads())


MEASURES = {
    "throughput": throughput.measure,
    "rates": loads.measure_rates,
    "concurrency": loads.measure_concurrency,
    "memory": memory.measure,
    "quantized": memory.measure_quantized,
}


def _load(options: Options) -> Bench:
    """A stock model, a second one to be patched, and their tokenizer: of each what is needed.

    Raises ConnectionError for a peer that does not answer.
    """
    served = {peer.name: peer.model(options.peer_headers) for peer in options.peers}
    if not options.systems:
        from transformers import AutoTokenizer

        name = options.model or str(default_model_folder())
        return Bench(options, AutoTokenizer.from_pretrained(name), name, served=served)
    loading = {"dtype": getattr(torch, options.dtype), "device": options.device}
    loading |= {
        "num_ranks": options.num_ranks,
        "expert_parallel": options.expert_parallel,
        "progress": not options.rank,
    }
    stock, tokenizer = load_model(options.model, **loading)
    paged = load_model(options.model, **loading)[0] if "paged" in options.systems else None
    return Bench(options, tokenizer, str(getattr(stock.config, "_name_or_path", "")), stock, paged, served)


@contextmanager
def _patched(bench: Bench):
    options = bench.options
    more = {"max_num_seqs": options.max_num_seqs, "speculation": options.speculation}
    hf_paged.patch(bench.paged, tokenizer=bench.tokenizer, quantization=options.quantization, **more)
    try:
        yield
    finally:
        hf_paged.unpatch(bench.paged)


def _warm_up(bench: Bench, requests: Sequence[workload.Request]) -> None:
    """Compile kernels and touch weights and memory outside the measured time: a few tokens of every model."""
    few = [dataclasses.replace(request, max_new_tokens=2) for request in requests[:4]]
    if bench.stock is not None:
        systems.run_stock(bench.stock, few[:1], ignore_eos=True)
    if PAGED in bench.systems:
        led(bench.paged, partial(systems.run_paged, requests=few, ignore_eos=True, cache_salt="warm-up"))


def _write_trace(engine, works, options: Options) -> None:
    """Of one run of every workload, beside what is measured."""
    with engine.trace(options.profile):
        for work in works:
            systems.run_paged(engine, work.requests, ignore_eos=True, cache_salt=f"trace-{work.name}")
    print(f"Chrome trace of the engine's steps in {options.profile}", file=sys.stderr)
