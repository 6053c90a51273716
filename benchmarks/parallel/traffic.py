"""What goes between the ranks of a sharded model, and what each holds, counted on this machine.

    torchrun --nproc-per-node 2 benchmarks/run.py parallel.traffic MODEL [--expert-parallel]

prints, for a prompt and for decode steps, the bytes and calls of every kind beside those of cost.py, the time of a step,
and how much memory each rank took to load its shards.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

import torch.distributed as dist

import hf_paged
from hf_paged import SamplingParams
from hf_paged.hf.build import load_model
from hf_paged.hf.sharding import num_rounded_jointly
from hf_paged_kernels import ops

from .cost import PEAK, WINNER, Sizes, embedded_per_token, summed_per_token


def sizes_of(model) -> Sizes:
    config, weight = model.config.get_text_config(decoder=True), next(model.parameters())
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        weight_bytes=weight.element_size(),
        activation_bytes=weight.element_size(),
        tied=bool(config.tie_word_embeddings),
    )


def measure(engine, sequences: int, prompt: int, tokens: int) -> tuple[dict, dict, float]:
    """(traffic of the prompts' step, of a decode step, its median seconds)."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    for row in range(sequences):
        engine.add([3 + (7 * row + place) % 50 for place in range(prompt)], params)
    steps, times = [], []
    while engine.has_unfinished():
        engine.model.team.traffic.clear()
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
        steps.append(dict(engine.model.team.traffic))
    return steps[0], steps[len(steps) // 2], statistics.median(times[1:])


def report(engine, sequences: int, prompt: int, tokens: int) -> None:
    model, team = engine.model, engine.model.team
    sizes = sizes_of(model.module)
    attention_is_whole = model.layers[0].num_heads == sizes.heads  # only experts are dealt out
    split = hasattr(model.module.get_input_embeddings().weight, "placements")
    kernels = ops.resolve_backend("auto", model.device)
    first, later, seconds = measure(engine, sequences, prompt, tokens)
    for name, step, count in (("prompts", first, sequences * prompt), ("decode", later, sequences)):
        planned = {
            "all_reduce": count * summed_per_token(sizes, 1 if attention_is_whole else 2),
            "embedding": count * embedded_per_token(sizes) * split,
            "winners": sequences * WINNER * model.finds_winners,
            "scales": count * PEAK * num_rounded_jointly(model.module, kernels),
        }
        for kind, bytes_planned in planned.items():
            print(f"{name}: {count} tokens: {kind}: {step.get(kind, 0)} bytes in {step.get(f'calls {kind}', 0)} calls, "
                  f"by the plan {bytes_planned}")  # fmt: skip
        print(f"{name}: orders: {step['orders']} bytes in {step['calls orders']} broadcasts")
    print(f"decode: {1e3 * seconds:.1f} ms a step of {sequences} sequences on {team.size} ranks, {model.device}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--expert-parallel", action="store_true")
    options = parser.parse_args()
    ranks, before = int(os.environ["WORLD_SIZE"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, _ = load_model(options.model, num_ranks=ranks, progress=False, expert_parallel=options.expert_parallel)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    print(f"rank {dist.get_rank()}: loading took {taken:.0f} MiB more at its peak; the whole model has {whole:.0f} MiB", flush=True)
    hf_paged.patch(model, max_batch_tokens=options.sequences * options.prompt, cuda_graphs=False)  # replays are not counted
    if dist.get_rank():
        hf_paged.follow(model)
    else:
        report(hf_paged.engine_of(model), options.sequences, options.prompt, options.tokens)
    hf_paged.unpatch(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
