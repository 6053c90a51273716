"""What the decode and prefill kernels share: one tile of keys and values against a block of query rows, and the end.

All exponentials are base 2: the launcher multiplies scores, slopes and the softcap by log2(e) beforehand, so that every
weight is one ex2 instruction. `peak` is the running maximum of a row's base-2 scores, `total` the sum of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def lowest_seen(position, span, SPAN: tl.constexpr):
    """The first position that a query at `position` sees. SPAN: "all", "window" or "chunk", of `span` positions."""
    if SPAN == "window":
        lowest = position - span + 1
    elif SPAN == "chunk":
        lowest = position - position % span
    else:
        lowest = position * 0
    return tl.maximum(lowest, 0)


@triton.jit
def load_tile(base, at, stride_d, present, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """[TILE, D_PAD] of a cache whose key i begins at base + at[i]; zeros where not present and beyond D."""
    d = tl.arange(0, D_PAD)
    pointers = base + at[:, None] + (d * stride_d)[None, :]
    if MASKED and D != D_PAD:
        return tl.load(pointers, mask=present[:, None] & (d < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=present[:, None], other=0.0)
    if D != D_PAD:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """A tile of a cache in the type of the product."""
    if x.dtype == tl.int8:  # by way of float32, as the hardware goes; the interpreter knows no other
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def load_query(query, rows, heads, valid, stride_t, stride_h, DK: tl.constexpr, DK_PAD: tl.constexpr):
    """[M, DK_PAD] of the given rows and heads; zeros where not valid and beyond DK."""
    d = tl.arange(0, DK_PAD)
    at = rows.to(tl.int64) * stride_t + heads * stride_h
    return tl.load(query + at[:, None] + d[None, :], mask=valid[:, None] & (d < DK)[None, :], other=0.0)


@triton.jit
def attend_tile(
    q, acc, peak, total, first, low, high, positions, lowest, slopes,
    k_cache, v_cache, k_scale, v_scale, table,
    k_stride_n, k_stride_d, k_stride_t, v_stride_n, v_stride_t, scale_stride_n, qk_scale, cap,
    DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(acc [M, DV_PAD], peak [M], total [M]) after the keys first .. first + TILE - 1; `first` is a multiple of TILE.

    Row i sees the keys from lowest[i] to positions[i], which are also what ALiBi counts from (with slopes, every row sees up
    to itself). Keys that no row sees lie outside [low, high) and may hold anything; `table` is the sequence's row of block ids and
    the caches point at one KV head. Without MASKED, every row sees the whole tile.
    """
    j = first + tl.arange(0, TILE)
    present = (j >= low) & (j < high)
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block: one look-up
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        offset = first % BLOCK_SIZE + tl.arange(0, TILE)
    elif MASKED:
        block = tl.load(table + j // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        offset = j % BLOCK_SIZE
    else:
        block = tl.load(table + j // BLOCK_SIZE).to(tl.int64)
        offset = j % BLOCK_SIZE
    if MASKED:
        present = (present & (block >= 0)).to(tl.int1)  # -1: the block was given back
        block = tl.maximum(block, 0)

    k = load_tile(k_cache, block * k_stride_n + offset * k_stride_t, k_stride_d, present, DK, DK_PAD, MASKED)
    s = tl.dot(q, tl.trans(widen(k, q.dtype)), input_precision="ieee") * qk_scale
    if k_scale is not None:
        s *= tl.load(k_scale + block * scale_stride_n + offset, mask=present, other=0.0)[None, :]
    if SOFTCAP:  # s is 2 log2(e) times what tanh is taken of; this form neither overflows nor loses a NaN
        e = tl.exp2(-tl.abs(s))
        t = cap * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -t, t)
    if slopes is not None:
        s += slopes[:, None] * (j[None, :] - positions[:, None])
    if MASKED:
        seen = (j[None, :] <= positions[:, None]) & present[None, :]
        if SPAN != "all":
            seen &= j[None, :] >= lowest[:, None]
        s = tl.where(seen, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = new_peak
    if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, 1)
    if v_scale is not None:
        weights *= tl.load(v_scale + block * scale_stride_n + offset, mask=present, other=0.0)[None, :]
    v = load_tile(v_cache, block * v_stride_n + offset * v_stride_t, 1, present, DV, DV_PAD, MASKED)
    acc = tl.dot(weights.to(q.dtype), widen(v, q.dtype), acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def finish_rows(
    acc, peak, total, out, lse, sinks, rows, heads, valid, keep,
    NUM_HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Write out[row, head] and the natural-log lse[row, head] (without the sink) of every valid (row, head).

    Rows without any key give zeros and -inf. `keep`: which rows of `out` to write at all.
    """
    empty = total == 0  # and not `total > 0`: a NaN must reach the result
    at = rows.to(tl.int64) * NUM_HEADS + heads
    if lse is not None:
        value = (peak + tl.log2(tl.where(empty, 1.0, total))) * LN_2
        tl.store(lse + at, tl.where(empty, float("-inf"), value), mask=valid)
    denominator = total
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        denominator += tl.exp2(sink - tl.where(empty, sink, peak))
    d = tl.arange(0, DV_PAD)
    result = acc / tl.where(denominator == 0, 1.0, denominator)[:, None]
    mask = (valid & keep)[:, None] & (d < DV)[None, :]
    tl.store(out + at[:, None] * DV + d[None, :], result.to(out.dtype.element_ty), mask=mask)


@dataclass(eq=False)
class AttentionCall:
    """One call of `ops.attention_`, as the launchers of both kernels need it. Shapes are those of `ops`.

    Attributes:
        span, kind: how many positions a query sees and how they are counted: "window", "chunk", or "all".
    """

    query: Tensor  # unit last stride
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    metadata: object
    sinks: Tensor | None
    slopes: Tensor | None
    scale: float
    softcap: float | None
    span: int
    kind: str

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.v_cache.shape[1]

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def key_bytes(self) -> int:
        """Of one key and value of one head, as a kernel's tile holds them."""
        sizes = self.constants()
        return (sizes["DK_PAD"] + sizes["DV_PAD"]) * self.k_cache.itemsize

    @property
    def wide(self) -> bool:
        """Whether products are float32: queries or keys are, or neither type holds the other's values."""
        cache = self.k_cache.dtype
        return self.query.dtype == torch.float32 or (self.k_scale is None and cache != self.query.dtype)

    def tensors(self) -> tuple:
        m = self.metadata
        return (self.query, self.k_cache, self.v_cache, self.k_scale, self.v_scale, m.cu_seqlens_q, m.seq_lens,
                m.block_table)  # fmt: skip

    def strides(self) -> tuple:
        """Of query (token, head), keys (block, head, dim, slot), values (block, head, slot), scales, block table."""
        k, v = self.k_cache.stride(), self.v_cache.stride()
        scale = (0, 0) if self.k_scale is None else self.k_scale.stride()[:2]
        return *self.query.stride()[:2], *k, *v[:3], *scale, self.metadata.block_table.stride(0)

    def factors(self) -> tuple[float, float]:
        """(qk_scale, cap) of `attend_tile`."""
        if self.softcap is None:
            return self.scale * _LOG2_E, 0.0
        return 2 * _LOG2_E * self.scale / self.softcap, self.softcap * _LOG2_E

    def constants(self) -> dict:
        _, _, block_size, dv = self.v_cache.shape
        dk = self.k_cache.shape[2]
        return dict(NUM_HEADS=self.num_heads, GROUP=self.group, DK=dk, DV=dv, DK_PAD=padded(dk), DV_PAD=padded(dv),
                    BLOCK_SIZE=block_size, SPAN=self.kind, SOFTCAP=self.softcap is not None,
                    WIDE=self.wide)  # fmt: skip


def padded(size: int) -> int:
    """The power of two that a tile of `size` columns takes; tl.dot wants at least 16."""
    return max(16, triton.next_power_of_2(size))


def generation(arch: str) -> str:
    """Which tables of tiles are for `arch`: "gfx", "sm_90" for data-centre GPUs from Hopper on, else "sm_80"."""
    if arch.startswith("gfx"):
        return "gfx"
    return "sm_90" if arch.startswith(("sm_90", "sm_10")) else "sm_80"
