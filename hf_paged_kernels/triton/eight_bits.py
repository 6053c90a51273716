"""Device functions of linear layers whose weights, and often inputs, have 8 bits: int8 or fp8 (e4m3).

    y[m, n] = x_scale[m] * sum over blocks b of K: w_scale[b, n] * sum over k in b: x8[m, k] * w8[n, k]

Sums within a block are exact in int8, and fp32 in fp8. Tensor cores add fp8 products of Hopper and Ada with some 14 bits
(DeepSeek-V3, 2412.19437, 3.3.2), so there partial sums go to fp32 after at most `PROMOTE` values of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import QuantizedWeight
from .functions import activate, rounded
from .launch import arch, is_amd
from .linear import stages
from .quantize import ROUND

PROMOTE = 128


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the GPU has products of fp8, and conversions; else inputs are not rounded to it."""
    name = arch(device)
    return name == "interpreter" or name.startswith("sm_") and int(name[3:]) >= 89


def rounds_to(weight: QuantizedWeight, device: torch.device) -> str | None:
    """The type that inputs are rounded to: what the weight says, but for fp8 on a GPU that cannot multiply it."""
    if weight.activations == "fp8" and not multiplies_fp8(device):
        return None
    return weight.activations


def fp8_data(weight: QuantizedWeight) -> Tensor:
    """The data as kernels take it: as int8 where the GPU does not know e4m3."""
    return weight.data if multiplies_fp8(weight.device) or weight.kind == "int8" else weight.data.view(torch.int8)


def depth_within(columns: int, limit: int) -> int:
    """The depth of a tile that lies within a block of so many columns: of 32 to `limit`, and a divisor if there is one."""
    divisor = columns & -columns
    return min(limit, divisor if divisor >= 32 else max(32, triton.next_power_of_2(columns)))


def is_even(K: int, columns: int, depth: int) -> bool:
    """Whether tiles of `depth` end where blocks of so many columns do, the last included."""
    return K % depth == 0 and (columns >= K or columns % depth == 0)


def stages_for(tile_bytes: int, device: torch.device) -> int:
    """As many as `linear` has with its tiles, and as many bytes in flight where tiles are smaller."""
    if is_amd(device):
        return 2
    return min(8, stages(device) * max(1, 16384 // tile_bytes))


@triton.jit
def row_peaks(x_rows, x_inside, norm_weight, offset, K, CHUNK: tl.constexpr):
    """The largest magnitude of each row of x (times `offset` + norm_weight), fp32 [R]; inf for a row with a NaN.

    x_rows are pointers to the rows' beginnings [R], x_inside tells which of them exist; the others' is 0.
    """
    k = tl.arange(0, CHUNK)
    peak = tl.zeros((x_rows.shape[0], CHUNK), tl.float32)
    for start in range(0, K, CHUNK):
        inside = x_inside[:, None] & (start + k < K)[None, :]
        x = tl.load(x_rows[:, None] + (start + k)[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm_weight is not None:
            x *= offset + tl.load(norm_weight + start + k, mask=start + k < K, other=0.0).to(tl.float32)[None, :]
        peak = tl.maximum(peak, tl.where(x == x, tl.abs(x), float("inf")))
    return tl.max(peak, 1)


@triton.jit
def first_rows(values, ROWS: tl.constexpr):
    """values [R] of the first rows -> [ROWS]; 0 for rows beyond."""
    row, of_value = tl.arange(0, ROWS), tl.arange(0, values.shape[0])
    return tl.sum(tl.where(row[:, None] == of_value[None, :], values[None, :], 0.0), 1)


@triton.jit
def rounded_to_8_bits(x, scale, dtype: tl.constexpr, CLIP: tl.constexpr):
    """x [M, K] / scale [M] in `dtype`, the quotients as exact as those of `quantize.scaled`, at a third of the price.

    Markstein: one step of Newton's method after a product with a reciprocal that is rounded to nearest gives the
    quotient rounded to nearest. CLIP: what is beyond the type's range is cut off (with a scale that is not the row's own).
    """
    LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    scale = tl.broadcast_to(scale[:, None], x.shape)
    inverse = tl.div_rn(1.0, scale)
    y = x * inverse
    y = tl.fma(tl.fma(-y, scale, x), inverse, y)
    if CLIP:
        y = tl.minimum(tl.maximum(y, -LIMIT, tl.PropagateNan.ALL), LIMIT, tl.PropagateNan.ALL)
    if dtype == tl.int8:
        y = tl.where(y == y, (y + ROUND) - ROUND, 0.0)
    return y.to(dtype)


@triton.jit
def from_e4m3(values, DTYPE: tl.constexpr):
    """fp8 values in DTYPE. If they come as int8 (`fp8_data`), by hand.

    Exponent and mantissa are put where fp16 has them; what is missing then is 2^(15 - 7), also for subnormals.
    """
    if values.dtype == tl.int8:
        wide = values.to(tl.int16)
        magnitude = wide & 0x7F
        moved = (wide & -32768) | (magnitude << 7)
        exact = moved.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), exact).to(DTYPE)
    return values.to(DTYPE)


@triton.jit
def num_steps(K, columns, BLOCK_K: tl.constexpr):
    """Steps of `products` through all K: a block takes cdiv(columns, BLOCK_K), the last one those that it has."""
    whole = K // columns
    return whole * tl.cdiv(columns, BLOCK_K) + tl.cdiv(K - whole * columns, BLOCK_K)


@triton.jit
def products(
    x_rows, x_inside, x_scale, w_rows, w_inside, up, scales, scales_up, scales_next, norm_weight, offset, K, columns,
    first, last, CLIP: tl.constexpr, GATED: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr,
    FLUSH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums above, of BLOCK_M rows of x and BLOCK_N rows of w, without x_scale; without w_scale too unless BLOCKED.

    Args:
        x_rows, w_rows: pointers to the rows' beginnings, [BLOCK_M] and [BLOCK_N].
        x_inside, w_inside: which of them exist.
        x_scale: [BLOCK_M]: round x to w's type with these scales. None: x has 8 bits already, or w is widened to x's type.
        up: for GATED, from a row of w to its partner in the second half.
        scales, scales_up: pointers to the scales of the rows of w (and their partners) in the first block, [BLOCK_N].
        scales_next: from a block's scales to the next's.
        norm_weight: None, or what x is multiplied by (with `offset` added).
        columns: of a block. EVEN: BLOCK_K divides it and the last block.
        first, last: of `num_steps`.
        FLUSH: sums go to fp32 at every step.

    Returns:
        (sums, sums with the second half, sums of squares of x [BLOCK_M]); the last two 0 unless asked for.
    """
    XTYPE: tl.constexpr = x_rows.dtype.element_ty
    WTYPE: tl.constexpr = w_rows.dtype.element_ty
    X8: tl.constexpr = XTYPE == tl.int8 or XTYPE == tl.float8e4nv
    INTEGER: tl.constexpr = WTYPE == tl.int8 and (X8 or x_scale is not None)
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    TOTAL: tl.constexpr = tl.float32 if BLOCKED else ACCUMULATOR
    k = tl.arange(0, BLOCK_K)
    nothing = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    result = tl.zeros((BLOCK_M, BLOCK_N), TOTAL)
    result_up = tl.zeros((BLOCK_M, BLOCK_N), TOTAL)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    steps = tl.cdiv(columns, BLOCK_K)
    for step in range(first, last):
        if BLOCKED:
            block = step // steps
            start = block * columns + (step - block * steps) * BLOCK_K
            end = tl.minimum(K, (block + 1) * columns)
            by_block = tl.load(scales + block * scales_next, mask=w_inside, other=0.0).to(tl.float32)
            if GATED:
                by_block_up = tl.load(scales_up + block * scales_next, mask=w_inside, other=0.0).to(tl.float32)
        else:
            start = step * BLOCK_K
            end = K
        if norm_weight is not None:
            by = offset + tl.load(norm_weight + start + k, mask=start + k < end, other=0.0).to(tl.float32)
        x_mask = x_inside[:, None]
        w_mask = w_inside[None, :]
        if not EVEN:
            x_mask = x_mask & (start + k < end)[None, :]
            w_mask = w_mask & (start + k < end)[:, None]
        w_at = w_rows[None, :] + (start + k)[:, None]
        x = tl.load(x_rows[:, None] + (start + k)[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_at, mask=w_mask, other=0.0, eviction_policy="evict_first")
        if norm_weight is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            x = wide * by[None, :]
        if x_scale is not None:
            x = rounded_to_8_bits(x.to(tl.float32), x_scale, WTYPE, CLIP)
        elif not X8:
            x = x.to(XTYPE)
            w = from_e4m3(w, XTYPE)
        if BLOCKED:
            sums = tl.dot(x, w, nothing, input_precision="ieee", out_dtype=ACCUMULATOR)
            result += sums.to(tl.float32) * by_block[None, :]
        elif FLUSH:
            result += tl.dot(x, w, nothing, input_precision="ieee", out_dtype=ACCUMULATOR)
        else:
            result = tl.dot(x, w, result, input_precision="ieee", out_dtype=ACCUMULATOR)
        if GATED:
            w_up = tl.load(w_at + up, mask=w_mask, other=0.0, eviction_policy="evict_first")
            if x_scale is None and not X8:
                w_up = from_e4m3(w_up, XTYPE)
            if BLOCKED:
                sums_up = tl.dot(x, w_up, nothing, input_precision="ieee", out_dtype=ACCUMULATOR)
                result_up += sums_up.to(tl.float32) * by_block_up[None, :]
            elif FLUSH:
                result_up += tl.dot(x, w_up, nothing, input_precision="ieee", out_dtype=ACCUMULATOR)
            else:
                result_up = tl.dot(x, w_up, result_up, input_precision="ieee", out_dtype=ACCUMULATOR)
    return result.to(tl.float32), result_up.to(tl.float32), squares


@triton.jit
def finished(
    y, y_up, by_row, scales, scales_up, bias, n, inside, N, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Sums [M, BLOCK_N] times by_row [M] and the columns' scales (None: they are in the sums), with bias, gated. fp32.

    n are the columns' numbers and `inside` tells which exist; N is from a column to its partner in the second half.
    """
    if by_row is not None:
        y *= by_row[:, None]
    if scales is not None:
        y *= tl.load(scales, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        if by_row is not None:
            y_up *= by_row[:, None]
        if scales is not None:
            y_up *= tl.load(scales_up, mask=inside, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y_up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        y = rounded(activate(rounded(y, DTYPE), ACTIVATION), DTYPE) * rounded(y_up, DTYPE)
    return y
