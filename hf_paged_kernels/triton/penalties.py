"""Rules on logits from what is known of each sequence's tokens, which stays on the device from step to step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import ALLOWED, COUNT_SHIFT, ENDING, FORBIDDEN, IN_PROMPT, OCCURRENCE, Penalties
from .launch import launch

_TILE = 2048  # logits per program: 8 for each of 256 threads

_IN_PROMPT = tl.constexpr(IN_PROMPT)
_ALLOWED = tl.constexpr(ALLOWED)
_FORBIDDEN = tl.constexpr(FORBIDDEN)
_ENDING = tl.constexpr(ENDING)
_COUNT_SHIFT = tl.constexpr(COUNT_SHIFT)
_OCCURRENCE = tl.constexpr(OCCURRENCE)
# Columns are rows of one tensor that was sent to the device as a whole: their alignment changes with their length, and must
# not be a reason to compile again.
_RULES = ["slots", "bias_slots", "repetition", "presence", "frequency", "only_allowed", "may_not_end"]


@triton.jit(do_not_specialize=["num_drafts"], do_not_specialize_on_alignment=[*_RULES, "drafts"])
def _penalize_kernel(
    logits, row_stride, scores, states, bias, drafts, num_drafts, slots, bias_slots, repetition, presence, frequency,
    only_allowed, may_not_end, vocab_size,
    BIAS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < vocab_size
    x = tl.load(logits + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        slot = tl.load(bias_slots + row)
        if slot >= 0:
            x += tl.load(bias + slot * vocab_size + at, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if slot >= 0:
        seen = tl.load(states + slot * vocab_size + at, mask=inside, other=0)
        for index in range(num_drafts):
            seen += tl.where(at == tl.load(drafts + row * num_drafts + index), _OCCURRENCE, 0)
        count = seen >> _COUNT_SHIFT
        factor = tl.load(repetition + row).to(tl.float32)
        repeated = tl.where(x < 0, x * factor, tl.div_rn(x, factor))
        x = tl.where(((seen & _IN_PROMPT) != 0) | (count > 0), repeated, x)
        by_count = tl.load(frequency + row).to(tl.float32) * count.to(tl.float32)
        x = tl.where(count > 0, x - by_count - tl.load(presence + row).to(tl.float32), x)
        closed = (seen & _FORBIDDEN) != 0
        closed = closed | ((tl.load(only_allowed + row) != 0) & ((seen & _ALLOWED) == 0))
        closed = closed | ((tl.load(may_not_end + row) != 0) & ((seen & _ENDING) != 0))
        x = tl.where(closed, float("-inf"), x)
    tl.store(scores + row * vocab_size + at, x, mask=inside)


@triton.jit
def _resolved(tokens, sampled, at, SAMPLED: tl.constexpr):
    token = tl.load(tokens + at)
    if SAMPLED:
        if token < 0:
            token = tl.load(sampled - 1 - token)
    return token


@triton.jit(do_not_specialize_on_alignment=["slots", "tokens", "marks", "sampled"])
def _record_kernel(states, slots, tokens, marks, sampled, vocab_size, SAMPLED: tl.constexpr):
    at = tl.program_id(0)
    token = _resolved(tokens, sampled, at, SAMPLED)
    mark = tl.load(marks + at).to(tl.int32)
    place = states + tl.load(slots + at) * vocab_size + token
    inside = (token >= 0) & (token < vocab_size)
    if mark == _OCCURRENCE:
        tl.atomic_add(place, mark, mask=inside)
    else:
        tl.atomic_or(place, mark, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["rows", "tokens", "previous", "triggers", "sampled"])
def _forbid_kernel(scores, rows, tokens, previous, triggers, sampled, vocab_size, SAMPLED: tl.constexpr):
    at = tl.program_id(0)
    trigger = tl.load(triggers + at)
    if (trigger < 0) | (_resolved(previous, sampled, at, SAMPLED) == trigger):
        tl.store(scores + tl.load(rows + at) * vocab_size + tl.load(tokens + at), float("-inf"))


def penalize(logits: Tensor, states: Tensor, rules: Penalties, bias: Tensor | None, drafts: Tensor | None) -> Tensor:
    """See `sampling.penalize`. Products and sums are rounded as on the CPU: none are fused."""
    count, vocab_size = logits.shape
    scores = torch.empty(count, vocab_size, dtype=torch.float32, device=logits.device)
    num_drafts = 0 if drafts is None else drafts.shape[1]
    tile = min(_TILE, triton.next_power_of_2(vocab_size))
    launch(_penalize_kernel, (count, triton.cdiv(vocab_size, tile)), logits, logits.stride(0), scores, states,
           scores if bias is None else bias, rules.slots if drafts is None else drafts.contiguous(), num_drafts,
           *rules, vocab_size, BIAS=bias is not None, TILE=tile, num_warps=8, enable_fp_fusion=False)  # fmt: skip
    return scores


def record(states: Tensor, slots: Tensor, tokens: Tensor, marks: Tensor, sampled: Tensor | None) -> None:
    """See `sampling.record`. Integer atomics: the order of the programs does not matter."""
    launch(_record_kernel, (len(slots),), states, slots, tokens, marks, tokens if sampled is None else sampled,
           states.shape[1], SAMPLED=sampled is not None, num_warps=1)  # fmt: skip


def forbid(scores: Tensor, rows: Tensor, tokens: Tensor, previous: Tensor, triggers: Tensor, sampled: Tensor | None) -> None:
    """See `sampling.forbid`."""
    launch(_forbid_kernel, (len(rows),), scores, rows, tokens, previous, triggers,
           tokens if sampled is None else sampled, scores.shape[1], SAMPLED=sampled is not None, num_warps=1)  # fmt: skip
