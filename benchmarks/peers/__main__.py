"""OpenAI-compatible servers side by side, under requests that come ever faster.

    python benchmarks/run.py peers --peer hf_paged=http://127.0.0.1:8000/v1 --peer vllm=http://127.0.0.1:8001/v1
        [--rate 1 --rate 4 --rate inf] [--workload mixed] [--requests 64] [--model NAME]

All serve the same model, of which --model names the tokenizer (by default the embedded one). They get the same prompts, as
token ids, at the same moments, one server after another at each rate; at the next rate the prompts are others, so that
nobody has them cached. With --api-key-env the key is read from that environment variable. Rows go to peers.csv, a table
to peers.md, and a chart to peers.png, where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

from hf_paged.benchmarks.engine import workload
from hf_paged.benchmarks.engine.bench import WORKLOADS
from hf_paged.hf.build import default_model_folder

from .. import schema
from .load import Peer, load
from .report import Outcome, draw, outcome, rows_of, table


def positive(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise ValueError(text)
    return rate


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", required=True, help="NAME=URL, of an API that ends in /v1; repeatable")
    parser.add_argument("--rate", action="append", type=positive, help="requests a second, or inf; repeatable")
    parser.add_argument("--workload", default="mixed", help=f"{', '.join(WORKLOADS)}, or a trace (*.jsonl)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--model", help="hub id or folder with the tokenizer; by default the embedded model's")
    parser.add_argument("--api-key-env", help="environment variable that holds the key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    is_trace = options.workload.endswith(".jsonl")
    if not is_trace and options.workload not in WORKLOADS:
        parser.error(f"--workload has no {options.workload!r}; there are {', '.join(WORKLOADS)}, and paths of *.jsonl")
    try:
        peers = [Peer.parse(text) for text in options.peer]
    except ValueError as error:
        parser.error(f"--peer: {error}")
    key = os.environ.get(options.api_key_env or "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    models = {peer: peer.model(headers) for peer in peers}
    tokenizer = AutoTokenizer.from_pretrained(options.model or default_model_folder())
    outcomes: list[Outcome] = []
    for turn, rate in enumerate(options.rate or (1.0, 4.0, math.inf)):
        made = dict(seed=options.seed + turn, count=options.requests)
        work = workload.from_trace(options.workload, tokenizer, **made) if is_trace else WORKLOADS[options.workload](tokenizer, **made)
        for peer in peers:
            answers = asyncio.run(load(peer, models[peer], work.requests, rate, headers=headers, seed=options.seed))
            outcomes.append(outcome(peer.name, rate, answers))
            for problem in dict.fromkeys(outcomes[-1].problems):
                print(f"{peer.name}: {problem}")
    machine = schema.describe_machine("of the servers", os.cpu_count() or 1)
    name = f"{len(work.requests)} requests, {work.name}"
    schema.append_rows(options.out / "peers.csv", rows_of(outcomes, workload=name, model=next(iter(models.values()))), machine)
    text = f"{name}; commit {machine.commit}, {machine.date}\n\n{table(outcomes)}\n"
    (options.out / "peers.md").write_text(text)
    print(text)
    if find_spec("matplotlib") is None:
        print("no chart: matplotlib is missing (pip install 'hf_paged[bench]')")
    else:
        draw(outcomes, f"{name}; {machine.cpu}", options.out / "peers.png")


if __name__ == "__main__":
    main()
