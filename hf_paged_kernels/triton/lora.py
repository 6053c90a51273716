"""Low-rank terms of several adapters: two kernels a layer, or for layers computed as one, whatever adapters there are.

The first multiplies a tile of up to 16 rows of one adapter by its A, each program a part of K: tiles are few, and an A
that is read by one program after another keeps no memory busy. The second sums the parts, in one order, multiplies by B
and changes the layer's output. What is whose is read from the tables of `lora.Site` and `lora.RowTiles` on the device, so
what is launched depends on numbers of rows and the highest rank alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora import FIELDS, TILE_ROWS
from .launch import is_amd, launch

_DEPTH = 1024  # of K that one program multiplies
_COLUMNS = 64
_MAX_SPLITS = 8


@triton.jit
def _tile_of(tiles, order, BLOCK_M: tl.constexpr):
    """(slot, rows [BLOCK_M], which of them exist) of program (tile, ...)."""
    at = tiles + tl.program_id(0) * 3
    slot = tl.load(at).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    exists = m < tl.load(at + 2)
    return slot, tl.load(order + tl.load(at + 1) + m, mask=exists, other=0).to(tl.int64), exists


@triton.jit
def _shrink_kernel(
    x, table, order, tiles, hidden, parts, splits, K, x_stride, depth,
    FIELDS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    if tl.load(tiles + tl.program_id(0) * 3 + 2) == 0:
        return
    slot, rows, exists = _tile_of(tiles, order, BLOCK_M)
    part = tl.program_id(1) // (RANK // BLOCK_R)
    entry = table + (slot * parts + part) * FIELDS
    address = tl.load(entry)
    if address == 0:
        return
    a = address.to(tl.pointer_type(DTYPE))
    rank = tl.load(entry + 2)
    r = tl.program_id(1) % (RANK // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(2) * depth
    result = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, tl.minimum(begin + depth, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows_of_x = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=exists[:, None] & (k < K)[None, :], other=0.0)
        of_a = tl.load(a + r[None, :].to(tl.int64) * K + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)
        result = tl.dot(rows_of_x, of_a, result, input_precision="ieee")
    m = tl.arange(0, BLOCK_M)
    at = ((tl.program_id(0).to(tl.int64) * parts + part) * splits + tl.program_id(2)) * BLOCK_M * RANK
    tl.store(hidden + at + m[:, None] * RANK + r[None, :], result)


@triton.jit
def _expand_kernel(
    y, table, order, tiles, columns, hidden, parts, splits, y_stride,
    FIELDS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = y.dtype.element_ty
    if tl.load(tiles + tl.program_id(0) * 3 + 2) == 0:
        return
    slot, rows, exists = _tile_of(tiles, order, BLOCK_M)
    part = tl.program_id(1)
    entry = table + (slot * parts + part) * FIELDS
    b_address, rank = tl.load(entry + 1), tl.load(entry + 2)
    scale_address, shift_address = tl.load(entry + 3), tl.load(entry + 4)
    first = tl.load(columns + part)
    N = tl.load(columns + part + 1) - first
    n = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ((b_address | scale_address | shift_address) == 0) | (tl.program_id(2) * BLOCK_N >= N):
        return
    inside = exists[:, None] & (n < N)[None, :]
    at = y + rows[:, None] * y_stride + (first + n)[None, :]
    own = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if scale_address != 0:
        own *= tl.load(scale_address.to(tl.pointer_type(DTYPE)) + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if shift_address != 0:
        own += tl.load(shift_address.to(tl.pointer_type(DTYPE)) + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if b_address != 0:
        m, r = tl.arange(0, BLOCK_M), tl.arange(0, RANK)
        h_at = hidden + (tl.program_id(0).to(tl.int64) * parts + part) * splits * BLOCK_M * RANK
        h = tl.zeros((BLOCK_M, RANK), tl.float32)
        for split in range(0, splits):
            h += tl.load(h_at + split * BLOCK_M * RANK + m[:, None] * RANK + r[None, :])
        b = b_address.to(tl.pointer_type(DTYPE))
        of_b = tl.load(b + r[:, None] * N + n[None, :], mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0)
        own += tl.dot(h.to(DTYPE), of_b, input_precision="ieee")
    tl.store(at, own.to(DTYPE), mask=inside)


def add_terms_(y: Tensor, x: Tensor, tiles, site) -> None:
    """y [T, N] and x [T, K] of one type, that of the terms, with contiguous rows: see `lora.add_terms_`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    num_tiles, parts, K = len(tiles.tiles), len(site.sizes), x.shape[1]
    rank = max(16, triton.next_power_of_2(max(site.max_rank, 1)))
    splits = min(_MAX_SPLITS, triton.cdiv(K, _DEPTH))
    block_r = min(rank, 32)
    block_k = min(64 if x.dtype == torch.float32 else 128, max(16, triton.next_power_of_2(K)))
    depth = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    hidden = torch.empty(num_tiles, parts, splits, TILE_ROWS, rank, dtype=torch.float32, device=x.device)
    shared = dict(FIELDS=FIELDS, RANK=rank, BLOCK_M=TILE_ROWS, num_warps=4)
    launch(_shrink_kernel, (num_tiles, parts * rank // block_r, splits), x, site.table, tiles.order, tiles.tiles, hidden, parts, splits, K,
           x.stride(0), depth, BLOCK_R=block_r, BLOCK_K=block_k, num_stages=2 if is_amd(x.device) else 3, **shared)  # fmt: skip
    columns = _COLUMNS if rank <= 128 else _COLUMNS // 2
    grid = (num_tiles, parts, triton.cdiv(max(site.sizes), columns))
    launch(_expand_kernel, grid, y, site.table, tiles.order, tiles.tiles, site.columns, hidden, parts, splits, y.stride(0),
           BLOCK_N=columns, num_stages=1, **shared)  # fmt: skip
