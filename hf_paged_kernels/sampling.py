"""From logits to tokens on the device: argmax, penalties and sampling. Public signatures, checks, dispatch to a backend.

Letters in shapes: R rows, V tokens of the vocabulary, N slots, E and M entries of a list.

A draw is an inverse CDF over integers. With x = logits / temperature, s = `weight_bits(V)` and u a uniform number:

    w[i] = floor(exp(x[i] - max(x)) * 2^s)        0 where the token is removed
    token = the first i with w[0] + ... + w[i] > floor(u * sum(w))

Integer sums do not depend on their order, so a row's token depends on its own logits and its own uniform alone, not on
the batch or on how the work was divided. exp is rounded to fp32. The kernels' own exp is the same on every GPU; torch's on
CPU and the reference's round one value in fifty differently, which changes the 24th bit of a weight, and the token if u
falls between the two sums: three draws in a hundred thousand at most, over 128k tokens with logits of any spread.

Backends: "triton" (no sort; CUDA and ROCm, or CPU tensors in Triton's interpreter) and "reference" (plain torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_VOCAB = 2**24  # ids and counts of a row fit 32 bits, and the weights keep their 24 bits

# What a slot's int32 knows of a token: four flags, then how often it is in the output.
IN_PROMPT = 1
ALLOWED = 2  # counts for rows with `only_allowed`
FORBIDDEN = 4
ENDING = 8  # forbidden for rows with `may_not_end`
COUNT_SHIFT = 4
OCCURRENCE = 1 << COUNT_SHIFT


class Penalties(NamedTuple):
    """Rules of the rows; tensors [R].

    Attributes:
        slots: int64, the row of `states` it looks at; -1: none, only the bias counts.
        bias_slots: int64, the row of `bias` that is added; -1: none.
        repetition, presence, frequency: float64, used rounded to fp32; 1, 0 and 0 change nothing.
        only_allowed: int64, not 0: all but ALLOWED tokens are removed.
        may_not_end: int64, not 0: ENDING tokens are removed.
    """

    slots: Tensor
    bias_slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    only_allowed: Tensor
    may_not_end: Tensor


def weight_bits(vocab_size: int) -> int:
    """s in the weights floor(exp(.) * 2^s): V of them fit int64 together."""
    return 62 - vocab_size.bit_length()


def argmax(logits: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(index of each row's first maximum int64 [R], the maximum fp32 [R]) of logits [R, V]; NaN counts as largest."""
    _check_logits(logits)
    if not len(logits):
        return _nothing(logits)
    return _module("sampling", backend, logits).argmax(logits)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    uniforms: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token per row.

    What is kept is transformers' choice, in its order: top-k keeps every token as likely as the k-th; top-p removes, from
    the least likely one up, tokens whose masses come to (1 - top_p) of the total, of equally likely ones those with the
    lowest ids first, never all; min-p removes tokens below min_p times the most likely one. Masses are the integer
    weights, so the cut is exact where transformers' fp32 sums are not: a token whose cumulative mass is within about
    5e-7 of the limit may be kept here and not there, or the other way round.

    Args:
        logits: [R, V], fp32, bf16 or fp16, any row stride. Not modified.
        temperature: float64 [R], used rounded to fp32; 0: the row's argmax, whatever the other options.
        top_k: int64 [R], 0: off.
        top_p, min_p: float64 [R], 1 and 0: off.
        uniforms: float64 [R] in [0, 1), or instead
        seeds, positions: int64 [R], from which they are made: 53 bits of splitmix64(splitmix64(seed) + (position + 1) *
            golden), the seed's 64 bits read as unsigned.

    Returns:
        tokens int64 [R] and peaks fp32 [R], the rows' maxima after temperature. A row whose peak is NaN or infinite has no
        distribution: its token is the argmax and means nothing unless the row is greedy.
    """
    _check_logits(logits)
    _check_columns(logits, torch.float64, temperature=temperature, top_p=top_p, min_p=min_p)
    _check_columns(logits, torch.int64, top_k=top_k)
    if (uniforms is None) == (seeds is None) or (seeds is None) != (positions is None):
        raise ValueError("give uniforms, or seeds and positions")
    if uniforms is not None:
        _check_columns(logits, torch.float64, uniforms=uniforms)
    else:
        _check_columns(logits, torch.int64, seeds=seeds, positions=positions)
    if not len(logits):
        return _nothing(logits)
    return _module("sampling", backend, logits).sample(logits, temperature, top_k, top_p, min_p, uniforms, seeds, positions)


def penalize(
    logits: Tensor,
    states: Tensor,
    rules: Penalties,
    *,
    bias: Tensor | None = None,
    drafts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """fp32 [R, V]: logits with bias, penalties and removed tokens, in this order:

        x += bias;  x = x * repetition if x < 0 else x / repetition     of tokens in prompt or output
        x -= frequency * count; x -= presence                           of tokens in the output
        x = -inf                                                        of tokens that are FORBIDDEN, or not ALLOWED, or ENDING

    Args:
        logits: [R, V] of a float dtype, any row stride.
        states: int32 [N, V], see `record`.
        bias: fp32 [N', V], if any row has some.
        drafts: int64 [R, E], tokens that count as output of this row only; -1: none.
    """
    _check_logits(logits)
    _check_states(states)
    if states.shape[1] != logits.shape[1]:
        raise ValueError(f"states has {states.shape[1]} columns and logits {logits.shape[1]}")
    integers = ("slots", "bias_slots", "only_allowed", "may_not_end")
    for name, column in rules._asdict().items():
        _check_columns(logits, torch.int64 if name in integers else torch.float64, **{f"rules.{name}": column})
    if bias is not None and (bias.dtype != torch.float32 or bias.shape[1:] != logits.shape[1:] or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous fp32 [N, {logits.shape[1]}], not {bias.dtype} {list(bias.shape)}")
    if drafts is not None and (drafts.dtype != torch.int64 or drafts.dim() != 2 or len(drafts) != len(logits)):
        raise ValueError(f"drafts must be int64 [{len(logits)}, E], not {drafts.dtype} {list(drafts.shape)}")
    if not len(logits):
        return logits.to(torch.float32, copy=True)
    return _module("penalties", backend, logits).penalize(logits, states, rules, bias, drafts)


def record(
    states: Tensor,
    slots: Tensor,
    tokens: Tensor,
    marks: Tensor,
    *,
    sampled: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Note M things about tokens, in place: a flag, or OCCURRENCE for one more in the output.

    Args:
        states: int32 [N, V].
        slots, tokens, marks: int64 [M]. Tokens outside the vocabulary (placeholders of images) are passed over. One
            below 0, say -1 - i, stands for sampled[i].
        sampled: int64, tokens that may not have reached the host yet.
    """
    _check_states(states)
    for name, column in (("slots", slots), ("tokens", tokens), ("marks", marks)):
        if column.dtype != torch.int64 or column.shape != slots.shape or column.dim() != 1:
            raise ValueError(f"{name} must be int64 [{len(slots)}], not {column.dtype} {list(column.shape)}")
    if len(slots):
        _module("penalties", backend, states).record(states, slots, tokens, marks, sampled)


def forbid(
    scores: Tensor,
    rows: Tensor,
    tokens: Tensor,
    previous: Tensor,
    triggers: Tensor,
    *,
    sampled: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """scores[row, token] = -inf for M entries whose `previous` token is their trigger (or whose trigger is -1), in place.

    Args:
        scores: fp32 [R, V] contiguous.
        rows, tokens, previous, triggers: int64 [M]; one of `previous` below 0, say -1 - i, stands for sampled[i].
    """
    if scores.dtype != torch.float32 or scores.dim() != 2 or not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous fp32 [R, V], not {scores.dtype} {list(scores.shape)}")
    for name, column in (("rows", rows), ("tokens", tokens), ("previous", previous), ("triggers", triggers)):
        if column.dtype != torch.int64 or column.shape != rows.shape or column.dim() != 1:
            raise ValueError(f"{name} must be int64 [{len(rows)}], not {column.dtype} {list(column.shape)}")
    if len(rows):
        _module("penalties", backend, scores).forbid(scores, rows, tokens, previous, triggers, sampled)


def _module(name: str, backend: str, tensor: Tensor):
    """The module that implements a backend, imported on first use."""
    package = "triton" if ops.resolve_backend(backend, tensor.device) == "triton" else "ref"
    return import_module(f".{package}.{name}", __package__)


def _nothing(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.float32)


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in _FLOATS:
        raise ValueError(f"logits must be [R, V] of one of {_FLOATS}, not {logits.dtype} {list(logits.shape)}")
    if not 0 < logits.shape[1] < MAX_VOCAB:
        raise ValueError(f"logits has {logits.shape[1]} columns, not between 1 and {MAX_VOCAB - 1}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous in its last dimension, not strided {logits.stride()}")


def _check_states(states: Tensor) -> None:
    if states.dim() != 2 or states.dtype != torch.int32 or not states.is_contiguous():
        raise ValueError(f"states must be contiguous int32 [N, V], not {states.dtype} {list(states.shape)}")


def _check_columns(logits: Tensor, dtype: torch.dtype, **columns: Tensor) -> None:
    for name, column in columns.items():
        if column.dtype != dtype or column.shape != logits.shape[:1] or not column.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} [{len(logits)}], not {column.dtype} {list(column.shape)}")
