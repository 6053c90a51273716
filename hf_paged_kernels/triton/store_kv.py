"""Writing keys and values into the pages, quantized if the cache is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..checks import values_lie_in_keys
from .attention_tile import padded
from .launch import interpreting, launch, num_sms
from .quantize import quantize

_ELEMENTS = 4096  # keys or values of a program: 32 a thread, 8 KiB of bf16
_FEW_ROWS = 8  # of a program where there are too few rows for all multiprocessors


@triton.jit(do_not_specialize=("num_rows",))
def _store_kernel(
    key, value, k_cache, v_cache, k_scale, v_scale, slot_mapping, num_rows,
    key_t, key_h, key_d, value_t, value_h, value_d, kc_n, kc_h, kc_d, kc_s, vc_n, vc_h, vc_s, scale_n, scale_h,
    block_size, NUM_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, h = (row // NUM_HEADS).to(tl.int64), (row % NUM_HEADS).to(tl.int64)
    slot = tl.load(slot_mapping + t, mask=row < num_rows, other=-1)
    here = slot >= 0
    block, offset = slot // block_size, slot % block_size
    d, e = tl.arange(0, DK_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    inside_k, inside_v = here[:, None] & (d < DK), here[:, None] & (e < DV)
    x = tl.load(key + (t * key_t + h * key_h)[:, None] + d * key_d, mask=inside_k, other=0.0)
    y = tl.load(value + (t * value_t + h * value_h)[:, None] + e * value_d, mask=inside_v, other=0.0)
    if k_scale is not None:
        at = block * scale_n + h * scale_h + offset
        x, scale = quantize(x, k_cache.dtype.element_ty)
        tl.store(k_scale + at, scale, mask=here)
        y, scale = quantize(y, v_cache.dtype.element_ty)
        tl.store(v_scale + at, scale, mask=here)
    k_at = k_cache + (block * kc_n + h * kc_h + offset * kc_s)[:, None] + d * kc_d
    v_at = v_cache + (block * vc_n + h * vc_h + offset * vc_s)[:, None] + e
    tl.store(k_at, x.to(k_cache.dtype.element_ty), mask=inside_k)
    tl.store(v_at, y.to(v_cache.dtype.element_ty), mask=inside_v)


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """See `ops.store_kv`. A program takes some rows, which are the (token, head) pairs."""
    num_tokens, num_heads, dk = key.shape
    _, _, block_size, dv = v_cache.shape
    if not num_tokens:
        return
    if values_lie_in_keys(k_cache, v_cache):
        dv = 0  # they are written with the keys
    dk_pad, dv_pad, num_rows = padded(dk), padded(dv), num_tokens * num_heads
    rows = max(1, _ELEMENTS // max(dk_pad, dv_pad))
    if num_rows < rows * num_sms(key.device) and not interpreting():
        rows = min(rows, _FEW_ROWS)
    scale_strides = (0, 0) if k_scale is None else k_scale.stride()[:2]
    launch(_store_kernel, (triton.cdiv(num_rows, rows),), key, value, k_cache, v_cache, k_scale, v_scale, slot_mapping,
           num_rows, *key.stride(), *value.stride(), *k_cache.stride(), *v_cache.stride()[:3], *scale_strides,
           block_size, NUM_HEADS=num_heads, DK=dk, DV=dv, DK_PAD=dk_pad, DV_PAD=dv_pad, ROWS=rows,
           num_warps=4)  # fmt: skip
