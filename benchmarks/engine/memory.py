"""What memory systems take: weights, and the KV cache over time; then the same with quantized weights."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory

import torch

import hf_paged
from hf_paged.hf.build import load_model
from hf_paged.hf.patch import led
from hf_paged.hf.quantize.spot import quantize_on_the_spot

from ..latency import Feed
from . import systems, workload
from .continuous import run_continuous
from .systems import BATCH, PAGED, STOCK_BATCH, STOCK_CONTINUOUS, STOCK_ONE, Run

MOST_REQUESTS, OUTPUT_SHARE, POINTS = 32, 4, 80
QUANTIZED = "int8"  # a GPTQ checkpoint of 8 bits, one scale a row


def measure(bench) -> None:
    """Mixed prompts with a quarter of their output, all there at once: every system serves all of them in its own way."""
    work = _work(bench)
    for system in bench.systems:
        bench.say(f"memory: {system}")
        run, model = _run(bench, system, work.requests), bench.paged if system == PAGED else bench.stock
        if run is not None:
            _add_rows(bench, "memory", work, system, run, systems.weight_bytes(model))


def measure_quantized(bench) -> None:
    """The model's own weights and those of a quantized checkpoint of it, under hf_paged; stock runs what it can: its own.

    Stock needs further packages for a GPTQ checkpoint, so that its padded batches run the model as it is.
    """
    if PAGED not in bench.systems or bench.options.quantization:
        return
    work = _work(bench)
    bench.say(f"quantized: the {QUANTIZED} checkpoint")
    more = {"ignore_eos": True, "progress": bench.bar.update}
    with _checkpoint(bench) as model:
        for system, weights, own in (
            (STOCK_BATCH, bench.options.dtype, bench.stock),
            (PAGED, bench.options.dtype, bench.paged),
            (PAGED, f"{QUANTIZED} (GPTQ)", model),
        ):
            if system not in bench.systems:
                continue
            bench.say(f"quantized: {system}, {weights}")
            if system == STOCK_BATCH:
                run = systems.run_stock(own, work.requests, batch=BATCH, **more)
            else:
                run = led(own, partial(systems.run_paged, requests=work.requests, cache_salt="quantized", **more))
            named = f"{system}, {weights} weights"
            _add_rows(bench, "quantized", work, named, run, systems.weight_bytes(own), stored=weights)


def _work(bench) -> workload.Workload:
    options = bench.options
    count = min(options.requests or MOST_REQUESTS, MOST_REQUESTS)
    work = workload.mixed(bench.tokenizer, seed=options.seed + 1, count=count)
    shorter = (dataclasses.replace(r, max_new_tokens=max(1, r.max_new_tokens // OUTPUT_SHARE)) for r in work.requests)
    return workload.Workload("mixed, short outputs", tuple(shorter))


def _run(bench, system: str, requests: Sequence[workload.Request]) -> Run | None:
    more = {"ignore_eos": True, "progress": bench.bar.update, "feed": Feed.at_once(len(requests))}
    if system == PAGED:
        return led(bench.paged, lambda engine: systems.run_paged(engine, requests, cache_salt="memory", **more))
    if system == STOCK_CONTINUOUS:
        return bench.try_continuous("memory", lambda: run_continuous(bench.stock, requests, **more))
    return systems.run_stock(bench.stock, requests, batch=1 if system == STOCK_ONE else BATCH, **more)


@contextmanager
def _checkpoint(bench):
    """A patched model, loaded from a checkpoint of rounded weights."""
    options = bench.options
    loading = dict(dtype=getattr(torch, options.dtype), device=options.device, progress=False)
    with TemporaryDirectory() as folder:
        model, tokenizer = load_model(options.model, **loading)
        quantize_on_the_spot(model, QUANTIZED)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        model, tokenizer = load_model(folder, **loading)
        hf_paged.patch(model, tokenizer=tokenizer, max_num_seqs=options.max_num_seqs)
        led(model, lambda engine: systems.run_paged(engine, [workload.Request((5, 6, 7), 2)], ignore_eos=True))
        try:
            yield model
        finally:
            hf_paged.unpatch(model)


def _add_rows(bench, part: str, work: workload.Workload, system: str, run: Run, weights: int, **detail) -> None:
    here = {"workload": work.name, "system": system}
    detail = detail | {"requests": len(work.requests), "fingerprint": work.fingerprint()}
    seconds, held = zip(*_thinned(run.kv)) if run.kv else ((), ())
    over_time = {"seconds": [round(at, 3) for at in seconds], "bytes": held} if part == "memory" else {}
    bench.add(part, **here, metric="weights", unit="bytes", samples=[weights], detail=detail)
    bench.add(part, **here, metric="kv_peak", unit="bytes", samples=[run.kv_bytes], detail=detail | over_time)
    bench.add(part, **here, metric="memory_peak", unit="bytes", samples=[weights + run.kv_bytes], detail=detail)
    bench.add(part, **here, metric="output_tokens", unit="1/s", samples=[run.rate], detail=detail)


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """So many that a chart shows no less: the largest of each stretch, and the last."""
    size = -(-len(points) // POINTS)
    return [max(points[at : at + size], key=lambda point: point[1]) for at in range(0, len(points), size)] + [
        points[-1]
    ]
