"""What an engine and stock make of the same prompts, and what is fused."""

from __future__ import annotations

import torch

import hf_paged
from hf_paged import SamplingParams

PROMPTS = [torch.randint(3, 190, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 31, 18)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)


def outputs(model, **options) -> list:
    """Tokens and log-probabilities of PROMPTS in one engine, in small steps; the model stays patched."""
    hf_paged.patch(model, max_batch_tokens=24, **options)
    completions = [output.outputs[0] for output in hf_paged.engine_of(model).generate(PROMPTS, GREEDY)]
    return [(c.token_ids, [entry[token].logprob for token, entry in zip(c.token_ids, c.logprobs)]) for c in completions]


def tokens(model) -> list[list[int]]:
    return [ids for ids, _ in outputs(model)]


def stock_tokens(model) -> list[list[int]]:
    generate = lambda prompt: model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)  # noqa: E731
    return [generate(prompt)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def fused(model) -> tuple[int, int]:
    """(attention modules, decoder layers) that are fused."""
    counts = hf_paged.explain(model).fused
    return counts.get("attention", 0), counts.get("layer", 0)
