"""Rules on logits in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import ALLOWED, COUNT_SHIFT, ENDING, FORBIDDEN, IN_PROMPT, OCCURRENCE, Penalties

_NEG_INF = float("-inf")


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
    known = (seen & IN_PROMPT != 0) | (count > 0)
    repetition = rules.repetition.float()[:, None]
    x = torch.where(known, torch.where(x < 0, x * repetition, x / repetition), x)
    lowered = x - rules.frequency.float()[:, None] * count - rules.presence.float()[:, None]
    x = torch.where(count > 0, lowered, x)
    with_slot = (rules.slots >= 0)[:, None]
    closed = (seen & FORBIDDEN != 0) | ((rules.only_allowed != 0)[:, None] & (seen & ALLOWED == 0))
    closed |= (rules.may_not_end != 0)[:, None] & (seen & ENDING != 0)
    return x.masked_fill(closed & with_slot, _NEG_INF)


def record(states: Tensor, slots: Tensor, tokens: Tensor, marks: Tensor, sampled: Tensor | None) -> None:
    tokens = _resolved(tokens, sampled)
    inside = (tokens >= 0) & (tokens < states.shape[1])
    index = slots * states.shape[1] + tokens.masked_fill(~inside, 0)
    flat, occurrences = states.view(-1), inside & (marks == OCCURRENCE)
    flat.index_add_(0, index, torch.where(occurrences, marks, 0).to(torch.int32))
    for bit in range(COUNT_SHIFT):
        marked = torch.zeros_like(flat).index_add_(0, index, (inside & ~occurrences & (marks >> bit & 1 != 0)).int())
        flat |= (marked > 0).int() << bit


def forbid(scores: Tensor, rows: Tensor, tokens: Tensor, previous: Tensor, triggers: Tensor, sampled: Tensor | None) -> None:
    due = (triggers < 0) | (_resolved(previous, sampled) == triggers)
    index = rows * scores.shape[1] + tokens
    flat = scores.view(-1)
    hit = torch.zeros_like(flat).index_add_(0, index, due.float())
    flat.masked_fill_(hit > 0, _NEG_INF)


def _resolved(tokens: Tensor, sampled: Tensor | None) -> Tensor:
    """Tokens below 0, say -1 - i, stand for sampled[i]."""
    if sampled is None:
        return tokens
    known = sampled[(-1 - tokens).clamp(min=0, max=len(sampled) - 1)]
    return torch.where(tokens < 0, known, tokens)
