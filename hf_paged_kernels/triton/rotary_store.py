"""What lies between the merged QKV projection and attention, in one kernel: norms of heads, rotary, KV write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import Norm
from .functions import rounded, scaled_by_weight
from .launch import launch
from .quantize import largest, quantize, scale_for, scaled

_HEADS = 8  # heads of a token that share a program and its cosines: 2 KiB in flight each keep memory busy
_ELEMENTS_PER_WARP = 512  # 16 elements a thread: from each half of a head 16 bytes of bf16, one load
_CASTS = {"weight_after": 2, "weight_before": 3}  # Q_CAST, K_CAST: 0 is no norm, 1 a norm without a weight


def rotary_store(
    query, key, value, k_cache, v_cache, slot_mapping, cos, sin, *, q_norm: Norm | None = None,
    k_norm: Norm | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `ops.rotary_store`. A program takes up to 8 query, key or value heads of one token."""
    num_tokens, q_heads, dim = query.shape
    _, kv_heads, block_size, v_dim = v_cache.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not num_tokens:
        return out
    rotary = cos is not None
    rotated = cos.shape[1] if rotary else dim // 2 * 2
    heads = min(_HEADS, triton.next_power_of_2(max(q_heads, kv_heads)))
    parts = triton.cdiv(q_heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    q_weight, q_eps, q_offset, q_cast = _options(q_norm, query)
    k_weight, k_eps, k_offset, k_cast = _options(k_norm, query)
    if not rotary:
        cos = sin = query  # not read
    rest = dim - rotated
    launch(
        _rotary_store_kernel, (num_tokens * parts,),
        query, key, value, out, k_cache, v_cache, k_scale, v_scale, slot_mapping, cos, sin, q_weight, k_weight,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *k_cache.stride(), *v_cache.stride()[:3],
        *((0, 0) if k_scale is None else k_scale.stride()[:2]), cos.stride(0), sin.stride(0), block_size,
        q_eps, q_offset, k_eps, k_offset,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, D=dim, DV=v_dim, R=rotated,
        HALF=triton.next_power_of_2(rotated // 2), REST=triton.next_power_of_2(rest) if rest else 0,
        WIDTH_V=triton.next_power_of_2(v_dim), HEADS=heads, ROTARY=rotary, Q_CAST=q_cast, K_CAST=k_cast,
        num_warps=min(8, max(1, triton.next_power_of_2(heads * dim // _ELEMENTS_PER_WARP))),
    )  # fmt: skip
    return out


def _options(norm: Norm | None, not_read: Tensor) -> tuple[Tensor, float, float, int]:
    """(weight, eps, offset, cast as the kernel knows it)"""
    if norm is None:
        return not_read, 0.0, 0.0, 0
    if norm.weight is None:
        return not_read, float(norm.eps), 0.0, 1
    return norm.weight, float(norm.eps), float(norm.offset), _CASTS[norm.cast]


@triton.jit
def _rotary_store_kernel(
    query, key, value, query_out, k_cache, v_cache, k_scale, v_scale, slot_mapping, cos, sin, q_weight, k_weight,
    query_t, query_h, key_t, key_h, value_t, value_h, kc_n, kc_h, kc_d, kc_s, vc_n, vc_h, vc_s, scale_n, scale_h,
    cos_t, sin_t, block_size, q_eps, q_offset, k_eps, k_offset,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WIDTH_V: tl.constexpr, HEADS: tl.constexpr, ROTARY: tl.constexpr,
    Q_CAST: tl.constexpr, K_CAST: tl.constexpr,
):  # fmt: skip
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    part = tl.program_id(0) % (Q_PARTS + 2 * KV_PARTS)
    t = (tl.program_id(0) // (Q_PARTS + 2 * KV_PARTS)).to(tl.int64)
    if part < Q_PARTS:
        h = part * HEADS + tl.arange(0, HEADS)[:, None]
        here = h < Q_HEADS
        low, high, rest = _head(query + t * query_t + h * query_h, here, q_weight, q_eps, q_offset, cos + t * cos_t,
                                sin + t * sin_t, D, R, HALF, REST, ROTARY, Q_CAST)  # fmt: skip
        _store_head(query_out + (t * Q_HEADS + h) * D, 1, here, low, high, rest, D, R, HALF, REST)
    else:
        slot = tl.load(slot_mapping + t)
        if slot >= 0:
            block, offset = slot // block_size, slot % block_size
            if part < Q_PARTS + KV_PARTS:
                h = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)[:, None]
                here = h < KV_HEADS
                low, high, rest = _head(key + t * key_t + h * key_h, here, k_weight, k_eps, k_offset, cos + t * cos_t,
                                        sin + t * sin_t, D, R, HALF, REST, ROTARY, K_CAST)  # fmt: skip
                if k_scale is not None:
                    low, high, rest, scale = _quantized_head(low, high, rest, k_cache.dtype.element_ty, D, R, HALF,
                                                             REST)  # fmt: skip
                    tl.store(k_scale + block * scale_n + h * scale_h + offset, scale[:, None], mask=here)
                out = k_cache + block * kc_n + h * kc_h + offset * kc_s
                _store_head(out, kc_d, here, low, high, rest, D, R, HALF, REST)
            else:
                h = (part - Q_PARTS - KV_PARTS) * HEADS + tl.arange(0, HEADS)[:, None]
                here = h < KV_HEADS
                d = tl.arange(0, WIDTH_V)[None, :]
                inside = here & (d < DV)
                x = tl.load(value + t * value_t + h * value_h + d, mask=inside, other=0.0)
                if v_scale is not None:
                    x, scale = quantize(x, v_cache.dtype.element_ty)
                    tl.store(v_scale + block * scale_n + h * scale_h + offset, scale[:, None], mask=here)
                tl.store(v_cache + block * vc_n + h * vc_h + offset * vc_s + d, x, mask=inside)


@triton.jit
def _head(
    x, here, weight, eps, offset, cos, sin, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ROTARY: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """The two halves of the first R dimensions of a few heads, and the rest (if any), normed and rotated.

    fp32 that is rounded wherever the eager modules of transformers store a tensor of the input's dtype.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    i, j = tl.arange(0, HALF)[None, :], R // 2 + tl.arange(0, HALF)[None, :]
    inside = i < R // 2
    low = tl.load(x + i, mask=here & inside, other=0.0).to(tl.float32)
    high = tl.load(x + j, mask=here & inside, other=0.0).to(tl.float32)
    rest = low
    if REST:
        k = R + tl.arange(0, REST)[None, :]
        rest = tl.load(x + k, mask=here & (k < D), other=0.0).to(tl.float32)
    if CAST:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if REST:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        low = _normed(low, scale, weight + i, inside, offset, dtype, CAST)
        high = _normed(high, scale, weight + j, inside, offset, dtype, CAST)
        if REST:
            rest = _normed(rest, scale, weight + k, k < D, offset, dtype, CAST)
    if ROTARY:
        cos_low, sin_low = tl.load(cos + i, mask=inside), tl.load(sin + i, mask=inside)
        cos_high, sin_high = tl.load(cos + j, mask=inside), tl.load(sin + j, mask=inside)
        rotated = rounded(low * cos_low, dtype) - rounded(high * sin_low, dtype)
        high = rounded(rounded(high * cos_high, dtype) + rounded(low * sin_high, dtype), dtype)
        low = rounded(rotated, dtype)
    return low, high, rest


@triton.jit
def _quantized_head(
    low, high, rest, dtype: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    """The parts of heads in `dtype`, and the scale [HEADS] of each head."""
    inside = tl.arange(0, HALF)[None, :] < R // 2
    low, high = tl.where(inside, low, 0.0), tl.where(inside, high, 0.0)
    peak = tl.maximum(largest(low), largest(high))
    if REST:
        rest = tl.where(R + tl.arange(0, REST)[None, :] < D, rest, 0.0)
        peak = tl.maximum(peak, largest(rest))
    scale = scale_for(peak, dtype)
    low, high, rest = scaled(low, scale, dtype), scaled(high, scale, dtype), scaled(rest, scale, dtype)
    return low, high, rest, scale


@triton.jit
def _normed(x, scale, weight, inside, offset, dtype: tl.constexpr, CAST: tl.constexpr):
    y = x * scale
    if CAST > 1:
        y = scaled_by_weight(y, tl.load(weight, mask=inside).to(tl.float32), offset, CAST == 2, dtype)
    return rounded(y, dtype)


@triton.jit
def _store_head(
    out, stride_d, here, low, high, rest, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    dtype: tl.constexpr = out.dtype.element_ty
    i = tl.arange(0, HALF)[None, :]
    tl.store(out + i * stride_d, low.to(dtype), mask=here & (i < R // 2))
    tl.store(out + (R // 2 + i) * stride_d, high.to(dtype), mask=here & (i < R // 2))
    if REST:
        k = R + tl.arange(0, REST)[None, :]
        tl.store(out + k * stride_d, rest.to(dtype), mask=here & (k < D))
