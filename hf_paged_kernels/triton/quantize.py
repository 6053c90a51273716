"""Rounding rows to 8 bits with a scale of their own."""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no fraction bits, so the sum is rounded half to even


@triton.jit
def quantize(x, dtype: tl.constexpr):
    """Rows [H, D] of floats -> ([H, D] of `dtype`, fp32 scales [H]); the formula is that of `ref.quantize`.

    A row with a NaN or an infinity gets the scale inf, so that it stays one when it is read.
    """
    LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    x = x.to(tl.float32)
    peak = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    scale = tl.maximum(peak, 1e-30) / LIMIT
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if dtype == tl.int8:
        y = tl.where(y == y, (y + ROUND) - ROUND, 0.0)
    return y.to(dtype), scale
