"""Rounding rows to 8 bits with a scale of their own."""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no fraction bits, so the sum is rounded half to even


@triton.jit
def largest(x):
    """The largest magnitude of each row of x [H, D], fp32 [H]; inf for a row with a NaN."""
    x = x.to(tl.float32)
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)


@triton.jit
def scale_for(peak, dtype: tl.constexpr):
    """The scale of a row whose largest magnitude is `peak`; the formula is that of `ref.quantize`."""
    LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    return tl.div_rn(tl.maximum(peak, 1e-30), LIMIT)


@triton.jit
def scaled(x, scale, dtype: tl.constexpr):
    """x [H, D] / scale [H] in `dtype`. What is no number stays none when it is read: its row's scale is inf."""
    y = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale[:, None], x.shape))
    if dtype == tl.int8:
        y = tl.where(y == y, (y + ROUND) - ROUND, 0.0)
    return y.to(dtype)


@triton.jit
def quantize(x, dtype: tl.constexpr):
    """Rows x [H, D] of floats -> ([H, D] of `dtype`, fp32 scales [H])."""
    scale = scale_for(largest(x), dtype)
    return scaled(x, scale, dtype), scale
