"""Copying whole blocks of a layer's cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..checks import values_lie_in_keys
from .launch import launch

_CHUNK = 4096  # elements a program copies: 8 KiB of bf16, a few loads of 16 bytes in flight for each of 128 threads


@triton.jit
def _copy_blocks_kernel(
    k_cache, v_cache, k_scale, v_scale, pairs, k_size, v_size, scale_size, k_stride, v_stride, scale_stride,
    CHUNK: tl.constexpr,
):  # fmt: skip
    source = tl.load(pairs + tl.program_id(0) * 2).to(tl.int64)
    destination = tl.load(pairs + tl.program_id(0) * 2 + 1).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(k_cache + source * k_stride + at, mask=at < k_size)
    value = tl.load(v_cache + source * v_stride + at, mask=at < v_size)
    tl.store(k_cache + destination * k_stride + at, key, mask=at < k_size)
    tl.store(v_cache + destination * v_stride + at, value, mask=at < v_size)
    if k_scale is not None:
        x = tl.load(k_scale + source * scale_stride + at, mask=at < scale_size)
        y = tl.load(v_scale + source * scale_stride + at, mask=at < scale_size)
        tl.store(k_scale + destination * scale_stride + at, x, mask=at < scale_size)
        tl.store(v_scale + destination * scale_stride + at, y, mask=at < scale_size)


def copy_blocks(
    k_cache: Tensor, v_cache: Tensor, pairs: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """See `ops.copy_blocks`. Each block is one run of memory, in whatever order its dimensions lie."""
    if not len(pairs):
        return
    k_size, v_size = k_cache[0].numel(), v_cache[0].numel()
    if values_lie_in_keys(k_cache, v_cache):
        v_size = 0
    scale_size, scale_stride = (0, 0) if k_scale is None else (k_scale[0].numel(), k_scale.stride(0))
    grid = (len(pairs), triton.cdiv(max(k_size, v_size), _CHUNK))
    launch(_copy_blocks_kernel, grid, k_cache, v_cache, k_scale, v_scale, pairs.to(k_cache.device).contiguous(), k_size,
           v_size, scale_size, k_cache.stride(0), v_cache.stride(0), scale_stride, CHUNK=_CHUNK)  # fmt: skip
