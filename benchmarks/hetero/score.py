"""How likely a hundred continuations of one prompt are, against stock transformers.

    python benchmarks/run.py hetero.score

- hf_paged               `Engine.score`, with a prompt that no cached prefix knows
- stock, one by one      a forward of prompt and continuation for each, as one writes it
- stock, padded batches  the same, BATCH of them at a time, padded on the right

Stock runs a sample of the continuations; rates are per continuation. Before the clock starts it is checked that all give
the same log-probabilities.
"""

from __future__ import annotations

import argparse
import random
from itertools import count

import torch

from hf_paged import Engine, EngineConfig
from hf_paged.benchmarks.engine import workload
from hf_paged.hf.build import load_model

from .. import schema
from .common import finish, parser_of, rows_of, take_turns

PAGED, ONE, PADDED = "hf_paged", "stock, one by one", "stock, padded batches"
BATCH = 8


def stock_scores(model, prompt: list[int], continuations: list[list[int]], batch: int) -> list[float]:
    """Sums of the continuations' log-probabilities, by forwards of `batch` rows."""
    sums = []
    for first in range(0, len(continuations), batch):
        rows = [prompt + tokens for tokens in continuations[first : first + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums += [float(logprobs[place, len(prompt) - 1 : len(row) - 1].sum()) for place, row in enumerate(rows)]
    return sums


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--prompt", type=int, default=600, help="tokens")
    parser.add_argument("--continuations", type=int, default=100)
    parser.add_argument("--longest", type=int, default=16, help="tokens of a continuation, at most; at least a quarter")
    parser.add_argument("--sample", type=int, default=BATCH, help="continuations that stock runs each round")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = measured(options)
    finish(rows, options, rows[0].workload)


def measured(options: argparse.Namespace) -> list[schema.Measure]:
    stock, tokenizer = load_model(options.model, device="cpu")
    model = load_model(options.model, device="cpu")[0]
    draw = random.Random(0)
    prompt = list(workload.piece(tokenizer, options.prompt, draw))
    sizes = [draw.randint(max(1, options.longest // 4), options.longest) for _ in range(options.continuations)]
    continuations = [list(workload.piece(tokenizer, size, draw)) for size in sizes]
    sample = continuations[: options.sample]
    salts = map(str, count())
    config = EngineConfig(max_num_seqs=max(2, options.continuations))
    with Engine(model, tokenizer, config) as engine:

        def paged() -> list[float]:
            scores = engine.score(prompt, continuations, cache_salt=next(salts))
            return [score.logprob for score in scores]

        runs = {
            PAGED: paged,
            ONE: lambda: stock_scores(stock, prompt, sample, 1),
            PADDED: lambda: stock_scores(stock, prompt, sample, BATCH),
        }
        for name in (ONE, PADDED):
            torch.testing.assert_close(runs[name](), paged()[: len(sample)], rtol=1e-4, atol=1e-3)
        seconds = take_turns(runs, options.rounds)
    counts = {PAGED: len(continuations), ONE: len(sample), PADDED: len(sample)}
    name = f"{len(continuations)} continuations of {options.prompt} tokens"
    about = dict(prompt=options.prompt, tokens=sum(sizes), sample=len(sample), batch=BATCH)
    common = dict(benchmark="hetero.score", workload=name, model=model.config._name_or_path, dtype="float32", detail=about)
    return [row for base in (ONE, PADDED) for row in rows_of(only(seconds, base), counts, "continuations", base, **common)]


def only(seconds: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """hf_paged beside one of the others."""
    return {name: taken for name, taken in seconds.items() if name in (PAGED, base)}


if __name__ == "__main__":
    main()
