"""JSON of a schema whose keys are long, with jumping ahead over what the schema leaves no choice about, and without.

    python benchmarks/run.py engine.structured

All requests run side by side in one engine, in turns with and without, and their tokens are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.engine.jump import JumpAhead
from hf_paged.hf.build import load_model

from .. import schema

KEYS = ("name_of_the_nearest_city", "direction_of_the_prevailing_wind", "average_temperature_in_celsius", "is_on_the_coast")
KINDS = (
    {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"},
    {"enum": ["north", "south", "east", "west"]},
    {"type": "integer", "minimum": -20, "maximum": 40},
    {"type": "boolean"},
)
FORM = {"type": "object", "properties": dict(zip(KEYS, KINDS)), "required": list(KEYS), "additionalProperties": False}


def measure(engine: Engine, rows: int, rounds: int) -> dict[str, list[tuple[float, dict]]]:
    """(seconds, stats) of every round, by system."""
    form = {"json": FORM, "disable_any_whitespace": True}
    prompts = [f"Describe place number {number} as JSON." for number in range(rows)]
    params = [SamplingParams(structured_outputs=form, max_tokens=200, seed=number) for number in range(rows)]
    plain = mock.patch.object(JumpAhead, "extend", lambda self, plan, scheduler: plan)
    systems = {"jumping": contextlib.nullcontext(), "step by step": plain}
    found: dict[str, list[tuple[float, dict]]] = {name: [] for name in systems}
    for round_number in range(rounds + 1):  # the first warms up
        tokens = []
        for name, context in systems.items():
            with context:
                engine.reset_prefix_cache()
                engine.reset_stats()
                started = time.perf_counter()
                outputs = engine.generate(prompts, params)
                seconds = time.perf_counter() - started
            tokens.append([output.outputs[0].token_ids for output in outputs])
            if round_number:
                count = sum(map(len, tokens[-1]))
                found[name].append((seconds, engine.stats() | {"output": count}))
        assert tokens[0] == tokens[1], "other tokens"
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, progress=False)
    measures = []
    with Engine(model, tokenizer, EngineConfig()) as engine:
        for rows in options.rows:
            found = measure(engine, rows, options.rounds)
            about = dict(benchmark="structured", model=model.config._name_or_path, dtype=str(model.dtype))
            measures += report(found, rows, about)
    machine = schema.describe_machine(str(model.device), options.threads)
    schema.append_rows(options.out / "structured.csv", measures, machine)


def report(found: dict[str, list[tuple[float, dict]]], rows: int, shared: dict) -> list[schema.Measure]:
    shared = shared | dict(workload=f"long keys, {rows} at once")
    measures = []
    for name, samples in found.items():
        seconds, stats = [one for one, _ in samples], samples[0][1]
        print(f"{rows:3} at once, {name:12}  {stats['output']:5} tokens, {stats['steps']:4} steps, "
              f"{stats['forced_tokens']:5} forced, {median(seconds):.2f} s", flush=True)  # fmt: skip
        measures += [
            schema.Measure(**shared, system=name, metric="time", unit="s", samples=seconds),
            schema.Measure(**shared, system=name, metric="steps", unit="steps", samples=[stats["steps"]]),
        ]
    ratios = [slow / fast for (fast, _), (slow, _) in zip(*found.values())]
    print(f"{rows:3} at once, {median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)
    shared |= dict(system="jumping", baseline="step by step")
    return [*measures, schema.Measure(**shared, metric="speed-up", unit="x", samples=ratios)]


if __name__ == "__main__":
    main()
