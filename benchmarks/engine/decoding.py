"""Decoding modes of `generate`, stock and patched in turn on one model: beams, candidates, guidance, shown scores.

    python -m hf_paged.benchmarks.engine.decoding [--model NAME] [--rounds 3] [--modes beam,lookup]

Every call of a round runs on the plain model and on the patched one, and their tokens are compared. Ratios are stock's
time by the patched model's, in the same round.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

import hf_paged
from hf_paged.benchmarks import schema
from hf_paged.hf.build import load_model

from . import workload

NEW = 48
MODES: dict[str, tuple[int, dict]] = {  # name -> (prompts of the batch, options)
    "greedy": (1, {}),
    "greedy batch": (8, {}),
    "beam": (1, dict(num_beams=4)),
    "beam batch": (4, dict(num_beams=4, num_return_sequences=2, length_penalty=1.2)),
    "beam sampling": (2, dict(num_beams=4, do_sample=True, top_k=50)),
    "lookup": (1, dict(prompt_lookup_num_tokens=6)),
    "guidance": (4, dict(guidance_scale=1.5)),
    "scores": (8, dict(return_dict_in_generate=True, output_scores=True)),
    "sampled returns": (1, dict(do_sample=True, num_return_sequences=8)),
}
OWN_DRAWS = {"sampled returns"}  # several rows draw from seeds of their own: other tokens than stock's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, progress=False)
    jobs = workload.mixed(tokenizer, count=64).requests
    prompts = [list(request.prompt) for request in jobs if 64 <= len(request.prompt) <= 256]
    measures = []
    for name in options.modes.split(","):
        rows, settings = MODES[name]
        measures += measure(model, name, padded(prompts[:rows], tokenizer.pad_token_id), settings, options.rounds)
    machine = schema.describe_machine(str(model.device), torch.get_num_threads())
    schema.append_rows(options.out / "decoding.csv", measures, machine)


def padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return dict(input_ids=ids, attention_mask=mask)


def measure(model, name: str, batch: dict, settings: dict, rounds: int) -> list[schema.Measure]:
    """Seconds of both, and their ratio, per round. The first call of each warms up."""
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0) | settings
    seconds: dict[str, list[float]] = {"stock": [], "hf_paged": []}
    for round_number in range(rounds + 1):
        tokens = []
        for system, times in seconds.items():
            if system == "hf_paged":
                hf_paged.patch(model, prefix_cache=False)  # no round gains from the one before
                hf_paged.engine_of(model)
            torch.manual_seed(round_number)
            start = time.perf_counter()
            result = model.generate(**batch, **options)
            if round_number:
                times.append(time.perf_counter() - start)
            tokens.append(getattr(result, "sequences", result))
            if system == "hf_paged":
                hf_paged.unpatch(model)
        if name not in OWN_DRAWS and not torch.equal(*tokens):
            raise SystemExit(f"{name}: the patched model's tokens differ from stock's")
    ratios = [stock / paged for stock, paged in zip(*seconds.values())]
    print(f"{name:16} stock {median(seconds['stock']):6.2f} s   hf_paged {median(seconds['hf_paged']):6.2f} s   "
          f"{median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)  # fmt: skip
    shared = dict(benchmark="decoding", workload=name, model=model.config._name_or_path, dtype=str(model.dtype))
    detail = dict(rows=len(batch["input_ids"]), new_tokens=NEW, width=batch["input_ids"].shape[1])
    rows = [
        schema.Measure(**shared, system=system, metric="time", unit="s", samples=times, detail=detail)
        for system, times in seconds.items()
    ]
    return [
        *rows,
        schema.Measure(**shared, system="hf_paged", metric="speed-up", unit="x", samples=ratios, baseline="stock"),
    ]


if __name__ == "__main__":
    main()
