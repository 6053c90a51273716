"""Sampling in plain torch: sorts where the kernels search, the same exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import ALLOWED, COUNT_SHIFT, ENDING, FORBIDDEN, OCCURRENCE, Penalties, weight_bits

_NEG_INF = float("-inf")
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


def penalize(logits: Tensor, states: Tensor, rules: Penalties, bias: Tensor | None, drafts: Tensor | None) -> Tensor:
    x = logits.to(torch.float32, copy=True)
    if bias is not None:
        x = torch.where(rules.bias_slots[:, None] >= 0, x + bias[rules.bias_slots.clamp(min=0)], x)
    seen = states[rules.slots.clamp(min=0)].masked_fill(rules.slots[:, None] < 0, 0)
    if drafts is not None:
        inside = (drafts >= 0) & (drafts < x.shape[1])
        once = torch.where(inside, OCCURRENCE, 0).to(torch.int32)
        seen = seen.scatter_add(1, drafts.masked_fill(~inside, 0), once)
    count = seen >> COUNT_SHIFT
    known = (seen & 1 != 0) | (count > 0)
    repetition = rules.repetition.float()[:, None]
    x = torch.where(known, torch.where(x < 0, x * repetition, x / repetition), x)
    lowered = x - rules.frequency.float()[:, None] * count - rules.presence.float()[:, None]
    x = torch.where(count > 0, lowered, x)
    with_slot = (rules.slots >= 0)[:, None]
    closed = (seen & FORBIDDEN != 0) | ((rules.only_allowed != 0)[:, None] & (seen & ALLOWED == 0))
    closed |= (rules.may_not_end != 0)[:, None] & (seen & ENDING != 0)
    return x.masked_fill(closed & with_slot, _NEG_INF)


def record(states: Tensor, slots: Tensor, tokens: Tensor, marks: Tensor, sampled: Tensor | None) -> None:
    tokens = resolve(tokens, sampled)
    inside = (tokens >= 0) & (tokens < states.shape[1])
    index = slots * states.shape[1] + tokens.masked_fill(~inside, 0)
    flat, occurrences = states.view(-1), inside & (marks == OCCURRENCE)
    flat.index_add_(0, index, torch.where(occurrences, marks, 0).to(torch.int32))
    for bit in range(COUNT_SHIFT):
        marked = torch.zeros_like(flat).index_add_(0, index, (inside & ~occurrences & (marks >> bit & 1 != 0)).int())
        flat |= (marked > 0).int() << bit


def forbid(scores: Tensor, rows: Tensor, tokens: Tensor, previous: Tensor, triggers: Tensor, sampled: Tensor | None) -> None:
    due = (triggers < 0) | (resolve(previous, sampled) == triggers)
    index = rows * scores.shape[1] + tokens
    flat = scores.view(-1)
    hit = torch.zeros_like(flat).index_add_(0, index, due.float())
    flat.masked_fill_(hit > 0, _NEG_INF)


def resolve(tokens: Tensor, sampled: Tensor | None) -> Tensor:
    """Tokens below 0, say -1 - i, stand for sampled[i]."""
    if sampled is None:
        return tokens
    known = sampled[(-1 - tokens).clamp(min=0, max=len(sampled) - 1)]
    return torch.where(tokens < 0, known, tokens)
