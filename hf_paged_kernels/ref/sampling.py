"""Sampling in plain torch: sorts where the kernels search, the same exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import weight_bits

_GOLDEN = 0x9E3779B97F4A7C15
_ROWS = 64  # rows at a time: the temporaries take a few times 8 bytes per logit


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    index = logits.argmax(-1)
    return index, logits.gather(1, index[:, None])[:, 0].float()


def sample(logits: Tensor, temperature, top_k, top_p, min_p, uniforms, seeds, positions) -> tuple[Tensor, Tensor]:
    if uniforms is None:
        uniforms = counter_uniforms(seeds, positions)
    columns = (logits, temperature, top_k, top_p, min_p, uniforms)
    parts = [_sample(*chunk) for chunk in zip(*(column.split(_ROWS) for column in columns))]
    tokens, peaks = zip(*parts)
    return torch.cat(tokens), torch.cat(peaks)


def _sample(logits, temperature, top_k, top_p, min_p, uniforms) -> tuple[Tensor, Tensor]:
    greedy = temperature == 0
    divisor = temperature.float().masked_fill(greedy, 1.0)[:, None]
    first, peaks = argmax(logits.float() / divisor)
    x = logits.float() / divisor
    usable = peaks.isfinite()
    x = x.masked_fill(~usable[:, None], 0.0)
    weights = integer_weights(x)
    weights = weights.masked_fill(~keep(x, weights, top_k, top_p, min_p), 0)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniforms[:, None] * total).to(torch.int64), total - 1)
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return torch.where(greedy | ~usable, first, drawn), peaks


def integer_weights(x: Tensor) -> Tensor:
    """floor(exp(x - max) * 2^s) as int64, from exponentials rounded to fp32; each row's maximum is finite."""
    ratio = (x - x.amax(-1, keepdim=True)).double().exp().float()
    return (ratio * 2.0 ** weight_bits(x.shape[1])).to(torch.int64)


def keep(x: Tensor, weights: Tensor, top_k, top_p, min_p) -> Tensor:
    """bool [R, V]: what top-k, then top-p, then min-p keep."""
    vocab_size = x.shape[1]
    ordered, order = x.sort(dim=-1, stable=True)
    kth = torch.where(top_k > 0, vocab_size - top_k.clamp(max=vocab_size), 0)
    ordered_kept = ordered >= ordered.gather(1, kth[:, None])
    masses = weights.gather(1, order).masked_fill(~ordered_kept, 0)
    cumulative = masses.cumsum(-1)
    limit = ((1.0 - top_p)[:, None] * cumulative[:, -1:]).to(torch.int64)
    cut = (cumulative <= limit) & (top_p < 1.0)[:, None]
    cut[:, -1] = False
    kept = torch.empty_like(ordered_kept).scatter_(1, order, ordered_kept & ~cut)
    return kept & (weights >= (min_p * 2.0 ** weight_bits(vocab_size)).ceil().to(torch.int64)[:, None])


def counter_uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) from 53 bits of splitmix64(splitmix64(seed) + (position + 1) * golden)."""
    bits = _mix(_mix(seeds) + (positions + 1) * _signed(_GOLDEN))
    return _shifted(bits, 11).double() * 2.0**-53


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, count: int) -> Tensor:
    """The logical right shift."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
