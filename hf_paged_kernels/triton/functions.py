"""Device functions that several kernels share. Arithmetic is fp32; `rounded` is where eager torch stores less."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x (fp32) as DTYPE holds it."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def exp(x):
    """e ** x as exact as torch's. tl.exp rounds x * log2(e) first: an error that grows with |x|.

    With n = round(x / ln 2), x = n ln 2 + rest; ln 2 is taken in two parts, n times the first of which is exact.
    """
    x = tl.minimum(tl.maximum(x, -150.0), 150.0)  # beyond, the result is 0 or infinite, but n would not be exact
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu(x), gelu(x) with erf, or gelu(x) with tanh, in the steps in which torch computes them in fp32."""
    if ACTIVATION == "silu":
        result = tl.div_rn(x, 1.0 + exp(-x))
    elif ACTIVATION == "gelu":
        result = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        u = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        positive = 1.0 - tl.div_rn(2.0, 1.0 + exp(2.0 * tl.abs(u)))  # tanh(|u|)
        result = 0.5 * x * (1.0 + tl.where(u < 0, -positive, positive))
    return result


@triton.jit
def scaled_by_weight(y, weight, offset, WEIGHT_AFTER: tl.constexpr, DTYPE: tl.constexpr):
    """(offset + weight) * y with the roundings of a Norm's cast but for the last; y and weight are fp32."""
    if WEIGHT_AFTER:
        return rounded(offset + weight, DTYPE) * rounded(y, DTYPE)
    return (offset + weight) * y

