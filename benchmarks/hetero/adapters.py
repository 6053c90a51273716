"""Requests with different adapters in one batch, against the same requests one adapter after another.

    python benchmarks/run.py hetero.adapters

Random LoRA adapters on all linear layers; each has as many requests as the others, of random tokens, decoded greedily. In
turns, in one process:

- mixed        all requests in one batch, each with its adapter
- in turn      a batch for each adapter, one after another
- PEFT in turn the same with stock's generate, its adapter active (--stock; padded batches)
- no adapter   all requests in one batch on the model alone, in an engine that has the adapters loaded

Before the clock starts it is checked that mixed and in turn give the same tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.hf.build import load_model

from .common import finish, parser_of, rows_of, take_turns

MIXED, TURNS, STOCK, PLAIN = "mixed", "in turn", "PEFT in turn", "no adapter"


@dataclass(frozen=True)
class Plan:
    """Sizes of the work. `prompt` and `output` in tokens, `requests` of each adapter."""

    adapters: int
    rank: int
    requests: int
    prompt: int
    output: int
    rounds: int


def make_adapters(model, count: int, rank: int, folder: Path) -> dict[str, Path]:
    """Saved adapters with random weights on all linear layers, by name. The model is as before afterwards."""
    paths = {}
    for place in range(count):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear", init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config)
        paths[f"adapter-{place}"] = folder / str(place)
        wrapped.save_pretrained(paths[f"adapter-{place}"])
        model = wrapped.unload()
    return paths


def systems(engine: Engine, model, plan: Plan, paths: dict[str, Path], stock) -> dict[str, Callable[[], list]]:
    """By name, what runs all requests and returns their tokens in one order."""
    draw = random.Random(0)
    vocabulary = engine.model.vocab_size
    names = [name for name in paths for _ in range(plan.requests)]
    prompts = [[draw.randrange(3, vocabulary) for _ in range(plan.prompt)] for _ in names]
    params = SamplingParams(temperature=0, max_tokens=plan.output, ignore_eos=True)

    def run(some: list[list[int]], adapters) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in engine.generate(some, params, adapter=adapters)]

    def parts() -> list[list[list[int]]]:
        return [prompts[first : first + plan.requests] for first in range(0, len(prompts), plan.requests)]

    def on_stock() -> list[list[int]]:
        tokens = []
        for name, part in zip(paths, parts()):
            stock.set_adapter(name)
            ids = torch.tensor(part)
            options = dict(max_new_tokens=plan.output, min_new_tokens=plan.output, do_sample=False)
            rows = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            tokens += rows[:, ids.shape[1] :].tolist()
        return tokens

    found = {
        MIXED: lambda: run(prompts, names),
        TURNS: lambda: [tokens for name, part in zip(paths, parts()) for tokens in run(part, name)],
        PLAIN: lambda: run(prompts, None),
    }
    return found if stock is None else found | {STOCK: on_stock}


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=1, help="of each adapter")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--stock", action="store_true", help="measure PEFT, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = Plan(*(getattr(options, name) for name in ("adapters", "rank", "requests", "prompt", "output", "rounds")))
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(options.model, device="cpu")
        paths = make_adapters(model, plan.adapters, plan.rank, Path(folder))
        stock = None
        if options.stock:
            first, *others = paths
            stock = peft.PeftModel.from_pretrained(load_model(options.model, device="cpu")[0], paths[first], first)
            for name in others:
                stock.load_adapter(paths[name], name)
            stock.eval()
        config = EngineConfig(max_num_seqs=max(8, plan.adapters * plan.requests), prefix_cache=False)
        with Engine(model, config=config) as engine:
            for name, path in paths.items():
                info = engine.load_adapter(name, path)
                assert info.apart is None, info.apart
            runs = systems(engine, model, plan, paths, stock)
            assert runs[MIXED]() == runs[TURNS](), "other tokens"
            seconds = take_turns(runs, plan.rounds)
            about = dict(vars(plan), adapter_bytes=engine.stats()["adapter_bytes"])
    tokens = plan.adapters * plan.requests * plan.output
    workload = f"{plan.adapters} adapters of rank {plan.rank}, {plan.requests} requests each"
    common = dict(benchmark="hetero.adapters", workload=workload, model=model.config._name_or_path, dtype="float32", detail=about)
    rows = rows_of(seconds, dict.fromkeys(seconds, tokens), "output_tokens", TURNS, **common)
    finish(rows, options, workload)


if __name__ == "__main__":
    main()
