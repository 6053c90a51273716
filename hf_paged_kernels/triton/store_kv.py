"""Writing keys and values into the pages, quantized if the cache is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .attention_tile import padded
from .quantize import quantize

_ELEMENTS = 4096  # keys of a token that a program takes: 32 a thread


@triton.jit
def _store_kernel(
    key, value, k_cache, v_cache, k_scale, v_scale, slot_mapping,
    key_t, key_h, key_d, value_t, value_h, value_d, kc_n, kc_h, kc_d, kc_s, vc_n, vc_h, vc_s, scale_n, scale_h,
    block_size, NUM_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + t)
    if slot < 0:
        return
    block, offset = slot // block_size, slot % block_size
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d, e = tl.arange(0, DK_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    here = h < NUM_HEADS
    inside_k, inside_v = here[:, None] & (d < DK), here[:, None] & (e < DV)
    h = h.to(tl.int64)
    x = tl.load(key + t * key_t + h[:, None] * key_h + d * key_d, mask=inside_k, other=0.0)
    y = tl.load(value + t * value_t + h[:, None] * value_h + e * value_d, mask=inside_v, other=0.0)
    if k_scale is not None:
        at = block * scale_n + h * scale_h + offset
        x, scale = quantize(x, k_cache.dtype.element_ty)
        tl.store(k_scale + at, scale, mask=here)
        y, scale = quantize(y, v_cache.dtype.element_ty)
        tl.store(v_scale + at, scale, mask=here)
    k_at = k_cache + block * kc_n + h[:, None] * kc_h + d * kc_d + offset * kc_s
    v_at = v_cache + block * vc_n + h[:, None] * vc_h + offset * vc_s + e
    tl.store(k_at, x.to(k_cache.dtype.element_ty), mask=inside_k)
    tl.store(v_at, y.to(v_cache.dtype.element_ty), mask=inside_v)


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """See `ops.store_kv`. A program takes some heads of one token."""
    num_tokens, num_heads, dk = key.shape
    _, _, block_size, dv = v_cache.shape
    if not num_tokens:
        return
    dk_pad, dv_pad = padded(dk), padded(dv)
    heads = min(triton.next_power_of_2(num_heads), max(1, _ELEMENTS // max(dk_pad, dv_pad)))
    scale_strides = (0, 0) if k_scale is None else k_scale.stride()[:2]
    launch(_store_kernel, (num_tokens, triton.cdiv(num_heads, heads)), key, value, k_cache, v_cache, k_scale, v_scale,
           slot_mapping, *key.stride(), *value.stride(), *k_cache.stride(), *v_cache.stride()[:3], *scale_strides,
           block_size, NUM_HEADS=num_heads, DK=dk, DV=dv, DK_PAD=dk_pad, DV_PAD=dv_pad, HEADS=heads,
           num_warps=4 if heads * dk_pad > 512 else 1)  # fmt: skip
