"""Numbers of the sampling kernels: ordered keys of logits, integer weights, the counter's uniform numbers.

Launch what uses them with enable_fp_fusion=False: every product and sum is then rounded as written, and the results are the
same on every device. tl.fma says where a product is not rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEG_INF_KEY = tl.constexpr(-2139095041)  # of -inf
NAN_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key(x):
    """int32, ordered as fp32 values are; 0.0 and -0.0 are one, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_KEY, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def value(keys):
    """fp32, the inverse of `key`."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def weight(x, peak, bits):
    """floor(exp(x - peak) * 2^bits) as int64, for x <= peak. exp is within 0.75 units of its last place.

    d = n ln 2 + r + rest with |r| <= ln 2 / 2: ln 2 is split in two so that n times the first part, of 16 bits, is exact.
    exp(r) is its Taylor polynomial to r^7, whose remainder is a tenth of the last place; what 1 + r loses is added back.
    """
    d = tl.maximum(x - peak, -64.0)  # less weighs nothing: bits is at most 61
    n = tl.floor(tl.fma(d, 1.4426950408889634, 0.5))
    r, rest = tl.fma(n, -0.693145751953125, d), n * -1.428606765330187e-06
    whole = r + rest
    p = tl.fma(whole, 1 / 5040, 1 / 720)
    p = tl.fma(p, whole, 1 / 120)
    p = tl.fma(p, whole, 1 / 24)
    p = tl.fma(p, whole, 1 / 6)
    p = tl.fma(p, whole, 0.5)
    one_r = 1.0 + r
    exp_r = one_r + ((r - (one_r - 1.0)) + tl.fma(whole * whole, p, rest))
    power = ((n.to(tl.int32) + bits + 127) << 23).to(tl.float32, bitcast=True)
    return (exp_r * power).to(tl.int64)


@triton.jit
def mix(word):
    """splitmix64's finaliser, on uint64."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def counter_uniform(seed, position):
    """float64 in [0, 1) from int64 bits; see `sampling.sample`. Arithmetic is modulo 2^64."""
    counter = (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    bits = mix(mix(seed.to(tl.uint64, bitcast=True)) + counter)
    return (bits >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)
