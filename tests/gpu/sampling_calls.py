"""Calls of the sampling kernels for the compile gate."""

from __future__ import annotations

import torch

from hf_paged_kernels import sampling

VOCAB = 128_256  # Llama 3's


def argmax(rows: int) -> None:
    sampling.argmax(torch.empty(rows, VOCAB, dtype=torch.bfloat16), backend="triton")


def sample(rows: int, dtype: torch.dtype, counter: bool) -> None:
    real, whole = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.int64)
    source = dict(seeds=whole, positions=whole) if counter else dict(uniforms=real)
    sampling.sample(torch.empty(rows, VOCAB, dtype=dtype), real, whole, real, real, **source, backend="triton")


def penalize() -> None:
    real, whole = torch.empty(8, dtype=torch.float64), torch.empty(8, dtype=torch.int64)
    states, bias = torch.empty(4, VOCAB, dtype=torch.int32), torch.empty(2, VOCAB)
    rules = sampling.Penalties(whole, whole, real, real, real, whole, whole)
    drafts = torch.empty(8, 3, dtype=torch.int64)
    logits = torch.empty(8, VOCAB, dtype=torch.bfloat16)
    scores = sampling.penalize(logits, states, rules, bias=bias, drafts=drafts, backend="triton")
    sampling.record(states, whole, whole, whole, sampled=whole, backend="triton")
    sampling.forbid(scores, whole, whole, whole, whole, sampled=whole, backend="triton")
