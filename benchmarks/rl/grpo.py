"""A step of TRL's GRPO trainer end to end, rollout and update: stock's, with rollouts of hf_paged, and in exact mode.

    python benchmarks/run.py rl.grpo

Prompts of random words; every step samples several completions of two of them and updates all weights. Each system trains
a copy of the model, one after the other, for one step before the clock starts; then in turns. Needs `hf_paged[trl]`.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import time
import warnings
from pathlib import Path

import torch

from hf_paged import EngineConfig
from hf_paged.hf.build import load_model

from .. import schema

STOCK, PAGED, EXACT = "stock", "hf_paged", "hf_paged exact"


def trainer_of(system: str, model, tokenizer, options: argparse.Namespace, folder: str):
    """A trainer of `model` whose every `train()` is one step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from hf_paged.integrations.trl import PagedGRPOTrainer

    args = GRPOConfig(
        output_dir=folder, max_steps=1, per_device_train_batch_size=options.prompts * options.n, num_generations=options.n,
        max_completion_length=options.output, learning_rate=1e-6, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
        bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=1,
    )  # fmt: skip
    draw = random.Random(0)
    words = [tokenizer.decode(draw.randrange(1000, 20000)) for _ in range(2000)]
    texts = ["".join(draw.choice(words) for _ in range(options.prompt)) for _ in range(8)]
    common = dict(
        model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_funcs=lambda completion_ids, **_: [sum(t % 2 for t in ids) / max(1, len(ids)) for ids in completion_ids],
    )  # fmt: skip
    if system == STOCK:
        return GRPOTrainer(**common)
    return PagedGRPOTrainer(**common, paged=EngineConfig(exact=system == EXACT))


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], str]:
    """(seconds of every step by system, the model's name)."""
    model, tokenizer = load_model(options.model, device="cpu")
    model = model.to(getattr(torch, options.dtype))
    model.generation_config.eos_token_id = None  # every completion is as long
    tokenizer.eos_token = tokenizer.pad_token
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainers = {s: trainer_of(s, copy.deepcopy(model), tokenizer, options, folder) for s in (STOCK, PAGED, EXACT)}
        for trainer in trainers.values():
            trainer.train()
        for _ in range(options.rounds):
            for system, trainer in trainers.items():
                started = time.perf_counter()
                trainer.train()
                seconds.setdefault(system, []).append(time.perf_counter() - started)
        for system in (PAGED, EXACT):
            trainers[system].rollout.close()
    return seconds, model.config._name_or_path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=2, help="of a step")
    parser.add_argument("--n", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--prompt", type=int, default=96, help="words, about as many tokens")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    seconds, name = measure(options)
    about = {key: getattr(options, key) for key in ("prompts", "n", "prompt", "output", "rounds")}
    rows = []
    for system, taken in seconds.items():
        common = dict(benchmark="rl.grpo", workload="step", model=name, dtype=options.dtype, system=system, detail=about)
        rows.append(schema.Measure(**common, metric="time", unit="s", samples=taken))
        if system != STOCK:
            ratios = [mine / other for mine, other in zip(taken, seconds[STOCK])]
            rows.append(schema.Measure(**common, metric="time", unit="ratio", samples=ratios, baseline=STOCK))
        print(f"{options.dtype} {system:<15} {min(taken):7.2f} s a step   {min(taken) / min(seconds[STOCK]):5.2f} times {STOCK}")
    schema.replace_rows(options.out / "rl.csv", rows, schema.describe_machine("cpu", options.threads))


if __name__ == "__main__":
    main()
