"""The inner loop of products with weights of whole numbers: a tile of the weight's rows times a few rows of x.

A step takes a block of the packed layout of every row, 16 words: the values of one field in it belong to 16 inputs
side by side, which is what a matrix instruction takes at once. The weight is the instruction's tall side, so the words
go from shared memory to the very registers where their values are needed, and nothing is moved between threads.

The values less their zero points are whole numbers, exact in the type of x. Scales multiply the sums over inputs that
share them, in fp32: they are not rounded into the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize import small_float
from .functions import activate, rounded
from .int_values import field_of_word, fields_of_half, from_int8, less


@triton.jit
def _minus(zeros, at, mask, BASE: tl.constexpr, DTYPE: tl.constexpr):
    """-(BASE + zero) [rows, 1]."""
    zero = tl.load(zeros + at, mask=mask, other=0).to(tl.int32)
    return (-BASE - small_float(zero)).to(DTYPE)[:, None]


@triton.jit
def _inputs(x_at, x_inside, start, K, perm, norm_weight, offset, EVEN_K: tl.constexpr, WIDTH: tl.constexpr):
    """x at inputs start to start + WIDTH [WIDTH, BLOCK_M], times the norm's weight."""
    DTYPE: tl.constexpr = x_at.dtype.element_ty
    k = start + tl.arange(0, WIDTH)
    inside = k < K
    if perm is not None:
        k = tl.load(perm + k, mask=inside, other=0)
    mask = x_inside[None, :]
    if not EVEN_K:
        mask = mask & inside[:, None]
    x = tl.load(x_at[None, :] + k[:, None], mask=mask, other=0.0)
    if norm_weight is not None:
        by = tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
        if offset is not None:
            by += offset
        x = (x.to(tl.float32) * by[:, None]).to(DTYPE)
    return x


@triton.jit
def _as_they_are(x_at, x_inside, start, K, WIDTH: tl.constexpr):
    """x at inputs start to start + WIDTH [BLOCK_M, WIDTH]: for the norm's sum of squares, in the order of memory."""
    k = start + tl.arange(0, WIDTH)
    return tl.load(x_at[:, None] + k[None, :], mask=x_inside[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _beside(left, right):
    """[N, W], [N, W] -> [N, 2 W]"""
    pairs = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(pairs, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _some_fields(words, low, high, first: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr,
                 DTYPE: tl.constexpr):  # fmt: skip
    """The values of COUNT (a power of two) fields side by side; `low` None: in plain operations."""
    if COUNT > 1:
        left = _some_fields(words, low, high, first, COUNT // 2, BITS, FIELDS, DTYPE)
        right = _some_fields(words, low, high, first + COUNT // 2, COUNT // 2, BITS, FIELDS, DTYPE)
        return _beside(left, right)
    elif low is None:
        return field_of_word(words, first, BITS, DTYPE)
    elif first < FIELDS // 2:
        return low[first]
    else:
        return high[first - FIELDS // 2]


@triton.jit
def products(
    x_rows, x_inside, w_rows, w_inside, scales, zeros, scale_k, zero_k, perm, norm_weight, offset, first, last, K,
    BITS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr,
    ZERO: tl.constexpr, BASE: tl.constexpr, EXTRACT: tl.constexpr, SUBTRACT: tl.constexpr, EVEN_K: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w @ x.T of BLOCK_N rows of w and BLOCK_M rows of x over blocks `first` to `last` of the inputs, in fp32.

    Args:
        x_rows, w_rows, scales, zeros: pointers to the rows' beginnings; zeros None for ZERO everywhere.
        x_inside, w_inside: which of them exist.
        scale_k, zero_k: from a group of COLUMNS inputs to the next.
        perm, norm_weight: None, or of K elements; norm_weight has `offset` added.
        RUN: so many fields, from the first of a block on, share scales.
        DEPTH: at most so many inputs in one matrix product.

    Returns:
        (products [BLOCK_N, BLOCK_M], sums of squares of x [BLOCK_M], 0 without a norm).
    """
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    WIDTH: tl.constexpr = FIELDS * LANES
    MOST: tl.constexpr = max(1, DEPTH // LANES)
    TAKEN: tl.constexpr = min(RUN & -RUN, MOST)  # fields of one product with x, a power of two of them
    lane = tl.arange(0, LANES)
    result = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M, TAKEN * LANES), tl.float32)
    minus = tl.full((BLOCK_N, 1), -BASE - ZERO, tl.float32).to(DTYPE)
    w_at = w_rows[:, None] + lane[None, :]
    next_scale = tl.load(scales + first * WIDTH // COLUMNS * scale_k, mask=w_inside, other=0.0)
    if norm_weight is not None:
        next_x = _as_they_are(x_rows, x_inside, first * WIDTH, K, TAKEN * LANES)
    for block in range(first, last):
        w_mask = w_inside[:, None]
        if FIELDS == 1 and not EVEN_K:
            w_mask = w_mask & (block * LANES + lane < K)[None, :]
        words = tl.load(w_at + block * LANES, mask=w_mask, other=0, eviction_policy="evict_first")
        low = None
        high = None
        if FIELDS > 1 and EXTRACT != "":
            low = fields_of_half(words.to(tl.int16), BITS, EXTRACT)
            high = fields_of_half((words >> FIELDS // 2 * BITS).to(tl.int16), BITS, EXTRACT)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for field in tl.static_range(0, FIELDS, TAKEN):
            start = block * WIDTH + field * LANES
            if field % RUN == 0:
                scale = next_scale.to(tl.float32)
                after = start + RUN * LANES  # its scale is on its way while this run is computed
                next_scale = tl.load(scales + after // COLUMNS * scale_k, mask=w_inside & (after < K), other=0.0)
                if zeros is not None:
                    minus = _minus(zeros, start // COLUMNS * zero_k, w_inside & (start < K), BASE, DTYPE)
            x = _inputs(x_rows, x_inside, start, K, perm, norm_weight, offset, EVEN_K, TAKEN * LANES)
            if norm_weight is not None:
                wide = next_x.to(tl.float32)
                squares += wide * wide
                next_x = _as_they_are(x_rows, x_inside, start + TAKEN * LANES, K, TAKEN * LANES)
            if FIELDS == 1:
                values = from_int8(words, DTYPE, EXTRACT)
            else:
                values = _some_fields(words, low, high, field, TAKEN, BITS, FIELDS, DTYPE)
            if zeros is not None or BASE + ZERO != 0:
                values = less(values, minus, DTYPE, SUBTRACT)
            sums = tl.dot(values, x, sums, input_precision="ieee")
            if (field + TAKEN) % RUN == 0:
                result += sums * scale[:, None]
                sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    return result, tl.sum(squares, axis=1)


@triton.jit
def rows_of_tile(index, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """(columns n of the result, rows of the weight) [BLOCK_N] of a tile; GATED: of either half as many, gates first."""
    in_tile = tl.arange(0, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n = index.to(tl.int64) * WIDTH + in_tile % WIDTH
    return n, n + in_tile // WIDTH * N


@triton.jit
def finished(y, bias, inside, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """y [BLOCK_N, BLOCK_M] plus a bias (pointers [BLOCK_N], or None); then, with an activation, gates times the rest."""
    if bias is not None:
        y += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, y.shape[0] // 2, y.shape[1])), (1, 2, 0)))
        y = rounded(activate(rounded(gate, DTYPE), ACTIVATION), DTYPE) * rounded(up, DTYPE)
    return y
