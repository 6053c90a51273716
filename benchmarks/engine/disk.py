"""Time to the first token of a prompt that an earlier engine wrote to disk, against computing it.

    python benchmarks/run.py engine.disk

Each round opens an engine of each kind, in turns, that has computed other tokens before. Files are as the operating system
has them: read moments after they were written they come from its memory, not from the device.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from hf_paged import Engine, EngineConfig, Offload, SamplingParams
from hf_paged.hf.build import load_model

from .. import schema

DISK, NONE = "disk", "none"
FIRST = SamplingParams(temperature=0, max_tokens=1)


def first_token(model, config: EngineConfig, prompt: list[int]) -> tuple[int, float, dict]:
    """(the token, seconds until it was there, the engine's numbers)."""
    with Engine(model, config=config) as engine:
        engine.generate([prompt[: -len(prompt) // 8 : -1]], FIRST)  # memory is taken, threads run, a speed is known
        if config.offload is not None:
            engine._offload._disk.wait()
        engine.reset_stats()
        (output,) = engine.generate([prompt], FIRST)
        stats = engine.stats()
    return output.outputs[0].token_ids[0], output.metrics.finished - output.metrics.arrival, stats


def measure(model, length: int, rounds: int, folder: str) -> list[schema.Measure]:
    draw = random.Random(0)
    prompt = [draw.randrange(3, model.config.vocab_size) for _ in range(length)]
    configs = {DISK: EngineConfig(offload=Offload("4GiB", disk=folder)), NONE: EngineConfig()}
    began = time.perf_counter()
    first_token(model, configs[DISK], prompt)  # writes
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    told, tokens = {}, set()
    for _ in range(rounds):
        for name, config in configs.items():
            token, taken, told[name] = first_token(model, config, prompt)
            seconds[name].append(taken)
            tokens.add(token)
    assert len(tokens) == 1 and told[DISK]["disk_hit_tokens"] >= length - 32, (tokens, told[DISK])
    common = dict(benchmark="engine.offload", workload="restart", model=model.config._name_or_path, dtype="float32")
    counts = {name: told[DISK][name] for name in ("disk_hit_tokens", "disk_bytes", "disk_files")} | {"prompt": length}
    gains = [slow / fast for slow, fast in zip(seconds[NONE], seconds[DISK])]
    print(f"{length} tokens: {median(seconds[DISK]):.2f} s from disk, {median(seconds[NONE]):.2f} s computed, "
          f"{median(gains):.1f} times ({min(gains):.1f} to {max(gains):.1f}); {counts}; all in {time.perf_counter() - began:.0f} s")  # fmt: skip
    rows = [
        schema.Measure(**common, system=name, metric="first token", unit="s", samples=values, detail=counts)
        for name, values in seconds.items()
    ]
    return [*rows, schema.Measure(**common, system=DISK, metric="speed-up", unit="1", samples=gains, baseline=NONE)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, _ = load_model(options.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(model, options.prompt, options.rounds, folder)
    schema.replace_rows(options.out / "offload.csv", rows, schema.describe_machine("cpu", options.threads))


if __name__ == "__main__":
    main()
