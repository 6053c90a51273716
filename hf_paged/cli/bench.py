"""`hf-paged bench`: stock transformers, hf_paged and other servers, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, ExpertParallel, Model, UserError, dtype_name, quiet_libraries
from .ranks import num_ranks, rank


def _option(panel: str, text: str, *names: str):
    return typer.Option(*names, help=text, rich_help_panel=panel)


WHAT, LOAD, HOW, PAGED, RESULTS = "What is measured", "Loads and other servers", "How", "hf_paged", "Results"


def bench(
    model: Model = None,
    parts: Annotated[
        str | None,
        _option(WHAT, "Some of throughput, rates, concurrency, memory, quantized, with commas between. Default all; on ranks throughput."),
    ] = None,
    system: Annotated[
        list[str] | None,
        _option(WHAT, "paged, one, batch, continuous: hf_paged, and stock one at a time, in padded batches, with continuous "
                "batching; repeatable. Default all. none: only --peer."),
    ] = None,
    workload: Annotated[
        list[str] | None,
        _option(WHAT, "For throughput: mixed, shared, chat, long, short, or a trace (*.jsonl); repeatable. Default mixed and shared."),
    ] = None,
    full: Annotated[bool, _option(WHAT, "Three rounds, whole workloads, more rates: for figures to be published.", "--full")] = False,
    peer: Annotated[
        list[str] | None,
        _option(LOAD, "NAME=URL of an OpenAI-compatible server of the same model, whose URL ends in /v1; repeatable."),
    ] = None,
    api_key_env: Annotated[str | None, _option(LOAD, "Environment variable with the peers' API key.")] = None,
    rate: Annotated[
        list[float] | None,
        _option(LOAD, "Requests a second; repeatable. Default multiples of what stock serves one at a time."),
    ] = None,
    load_workload: Annotated[str, _option(LOAD, "Workload of the rates and of concurrency.")] = "short",
    rounds: Annotated[int | None, _option(HOW, "Interleaved rounds of throughput; each gives one ratio.")] = None,
    requests: Annotated[int | None, _option(HOW, "Requests of a workload.")] = None,
    stock_sample: Annotated[
        int | None, _option(HOW, "How many of them stock's generate runs in all rounds: it is slow.")
    ] = None,
    threads: Annotated[int, _option(HOW, "CPU threads, of each process.")] = 2,
    dtype: Annotated[str, _option(HOW, "float32, bfloat16 or float16.")] = "float32",
    device: Device = None,
    seed: Annotated[int, _option(HOW, "Of the workloads and arrivals.")] = 0,
    max_num_seqs: Annotated[int, _option(PAGED, "Most sequences it runs at once.")] = 64,
    speculation: Annotated[str | None, _option(PAGED, "ngram: it guesses tokens ahead.")] = None,
    quantization: Annotated[
        str | None, _option(PAGED, "int4, int8 or fp8: it rounds its weights; stock's stay as they are.")
    ] = None,
    expert_parallel: ExpertParallel = False,
    out: Annotated[Path | None, _option(RESULTS, "Folder for engine.csv, engine.md and the charts.")] = None,
    readme: Annotated[
        bool, _option(RESULTS, "Write the tables into README.md of the checkout, too.", "--readme")
    ] = False,
    profile: Annotated[Path | None, _option(RESULTS, "Write a Chrome trace of the engine's steps to this file.")] = None,
) -> None:  # fmt: skip
    """Stock transformers, hf_paged and other servers side by side, interleaved in one run.

    About 5 minutes on 2 cores, with --full half an hour. Under torchrun stock and hf_paged are sharded by the same plan.
    """
    quiet_libraries()
    from hf_paged.benchmarks import schema
    from hf_paged.benchmarks.engine.bench import run_bench
    from hf_paged.benchmarks.engine.options import BOTH, FULL, QUICK, Options

    given = {} if out is None else {"out": out}
    given |= {} if system is None else {"systems": () if system == ["none"] else tuple(system)}
    given |= {} if parts is None else {"parts": tuple(part.strip() for part in parts.split(","))}
    run_bench(
        Options(
            model=model,
            workloads=workload or BOTH,
            load_workload=load_workload,
            peers=_peers(peer or []),
            peer_headers=_headers(api_key_env),
            rates=tuple(rate or ()),
            scale=FULL if full else QUICK,
            rounds=rounds,
            requests=requests,
            stock_sample=stock_sample,
            max_num_seqs=max_num_seqs,
            speculation=speculation,
            quantization=quantization,
            threads=threads,
            dtype=dtype_name(dtype),
            device=device,
            seed=seed,
            rank=rank(),
            num_ranks=num_ranks(),
            expert_parallel=expert_parallel,
            profile=profile,
            readme=schema.HERE.parent / "README.md" if readme else None,
            **given,
        )
    )


def _peers(texts: list[str]) -> tuple:
    from hf_paged.benchmarks.peers.load import Peer

    peers = tuple(Peer.parse(text) for text in texts)
    names = [peer.name for peer in peers]
    if len(set(names)) < len(names):
        raise UserError("--peer: every peer needs a name of its own")
    return peers


def _headers(variable: str | None) -> dict[str, str]:
    import os

    if variable is None:
        return {}
    if not os.environ.get(variable):
        raise UserError(f"--api-key-env: {variable} is not set")
    return {"Authorization": f"Bearer {os.environ[variable]}"}
