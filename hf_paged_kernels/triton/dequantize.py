"""Quantized weights as floating-point weights, for products of so many rows that torch's are better."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import BITS, FIELDS, LANES, QuantizedWeight
from .eight_bits import fp8_data, from_e4m3
from .launch import launch

_ROWS = 64  # of a program's tile; with a block of packed words or 128 bytes a row
_BLOCKS = 8  # of words, one after another, for a program


@triton.jit
def small_float(q):
    """fp32 of int32 with |q| < 2^22, by adding 1.5 * 2^23 to its bits: conversions are slow."""
    return (q + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _store_values(
    q, n, first, lane, out, scales, zeros, N, K, scale_k, zero_k,
    ZERO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Store scale * (q - zero) of rows n, columns first + lane (q is int32). UNIFORM: these columns share scales."""
    k, by_row = first + lane, n // ROWS
    row_inside = (n < N)[:, None]
    inside = row_inside & (k < K)[None, :]
    if UNIFORM:
        group = first // COLUMNS
        at, at_zero = (group * scale_k + by_row)[:, None], (group * zero_k + by_row)[:, None]
        mask = row_inside & (first < K)
    else:
        group = (k // COLUMNS).to(tl.int64)[None, :]
        at, at_zero, mask = group * scale_k + by_row[:, None], group * zero_k + by_row[:, None], inside
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if q.dtype == tl.float32:
        value = q
    elif zeros is None:
        value = small_float(q - ZERO)
    else:
        value = small_float(q - tl.load(zeros + at_zero, mask=mask, other=0).to(tl.int32))
    tl.store(out + n[:, None] * K + k[None, :], (value * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(
    data, scales, zeros, out, N, K, data_expert, data_row, scale_expert, scale_k, zero_expert, zero_k,
    BITS: tl.constexpr, FIELDS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FP8: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCKS times LANES words a row, of FIELDS fields each; FIELDS == 1: bytes in their place."""
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)
    data += expert * data_expert
    scales += expert * scale_expert
    out += expert * N * K
    if zeros is not None:
        zeros += expert * zero_expert
    WIDTH: tl.constexpr = LANES * FIELDS
    first = tl.program_id(0) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, tl.cdiv(K, WIDTH))):
        inside = (n < N)[:, None]
        if FIELDS == 1:  # packed rows are whole blocks
            inside = inside & (block * LANES + lane < K)[None, :]
        words = tl.load(data + n[:, None] * data_row + (block * LANES + lane)[None, :], mask=inside, other=0.0)
        for field in tl.static_range(FIELDS):
            if FP8:
                q = from_e4m3(words, tl.float32)
            else:
                q = words.to(tl.int32) if FIELDS == 1 else words >> BITS * field & (1 << BITS) - 1
            _store_values(q, n, block * WIDTH + field * LANES, lane, out, scales, zeros, N, K, scale_k, zero_k,
                          ZERO, ROWS, COLUMNS, COLUMNS % LANES == 0)  # fmt: skip


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """scale * (q - zero) [..., N, K], rounded to `dtype` once; columns in the order of the data, whatever `perm`."""
    N, K = weight.shape[-2:]
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    fields = FIELDS.get(weight.kind, 1)
    lanes = LANES if weight.is_packed else 128
    fp8 = weight.kind == "fp8"
    data = fp8_data(weight) if fp8 else weight.data
    data, scales, zeros = (_with_experts(t) for t in (data, weight.scales, weight.zeros))
    grid = (triton.cdiv(K, lanes * fields * _BLOCKS), triton.cdiv(N, _ROWS), len(data))
    launch(_dequantize_kernel, grid, data, scales, zeros, out, N, K, *data.stride()[:2], *scales.stride()[:2],
           *((0, 0) if zeros is None else zeros.stride()[:2]), BITS=BITS[weight.kind], FIELDS=fields,
           ZERO=weight.zero_point(), ROWS=weight.block[0], COLUMNS=weight.block[1], FP8=fp8, LANES=lanes, BLOCKS=_BLOCKS,
           BLOCK_N=_ROWS, num_warps=4)  # fmt: skip
    return out


def _with_experts(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 3 else tensor[None]
