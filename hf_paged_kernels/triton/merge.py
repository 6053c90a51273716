"""Merging attention over disjoint sets of keys by the logarithms of their sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LN_2, LOG2_E, padded
from .launch import launch

_PARTS = 8  # partial results loaded at once: of 128 floats each, 32 loads of 16 bytes in flight for every one of 8 lanes


@triton.jit(do_not_specialize=("num_parts",))
def _merge_kernel(
    parts, part_lses, sinks, out, lse, part_stride, lse_stride, num_parts,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    at, d, i = tl.program_id(0).to(tl.int64), tl.arange(0, D_PAD), tl.arange(0, PARTS)
    peak = tl.full([PARTS], float("-inf"), tl.float32)
    total = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, D_PAD], tl.float32)
    for first in range(0, num_parts, PARTS):
        part = (first + i).to(tl.int64)
        value = tl.load(part_lses + part * lse_stride + at, mask=part < num_parts, other=float("-inf")) * LOG2_E
        present = value != float("-inf")  # what holds no key may hold anything
        x = tl.load(parts + part[:, None] * part_stride + at * D + d[None, :],
                    mask=present[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)  # fmt: skip
        new_peak = tl.maximum(peak, value)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        fade, weight = tl.exp2(peak - shift), tl.exp2(value - shift)
        total = total * fade + weight
        acc = acc * fade[:, None] + x * weight[:, None]
        peak = new_peak
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(peak - base)
    sum_ = tl.sum(total * weight, 0)
    result = tl.sum(acc * weight[:, None], 0)
    empty = sum_ == 0
    if lse is not None:
        value = (base + tl.log2(tl.where(empty, 1.0, sum_))) * LN_2
        tl.store(lse + at, tl.where(empty, float("-inf"), value))
    if sinks is not None:
        sink = tl.load(sinks + at % NUM_HEADS).to(tl.float32) * LOG2_E
        sum_ += tl.exp2(sink - tl.where(empty, sink, base))
    result = result / tl.where(sum_ == 0, 1.0, sum_)
    tl.store(out + at * D + d, result.to(out.dtype.element_ty), mask=d < D)


def merge_states(
    parts: Tensor, part_lses: Tensor, out: Tensor, *, sinks: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """See `ops.merge_states`. A program merges the parts of one row and head."""
    num_parts, num_rows, num_heads, dim = parts.shape
    if num_rows:
        launch(_merge_kernel, (num_rows * num_heads,), parts, part_lses, sinks, out, lse, parts.stride(0),
               part_lses.stride(0), num_parts, NUM_HEADS=num_heads, D=dim, D_PAD=padded(dim), PARTS=_PARTS,
               num_warps=4)  # fmt: skip
    return out
