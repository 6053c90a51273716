"""Experts on weights of whole numbers: the product of `int_tile`, for the rows that chose an expert.

Few pairs of tokens and experts take a kernel that finds its rows itself, as in `moe`. Many are sorted by expert, without
the host being asked for anything: tiles of pairs belong to one expert each, and there are as many programs as there
could be tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import QuantizedWeight
from .functions import rounded
from .int_linear import constants, has_kernel
from .int_tile import finished, products, rows_of_tile
from .launch import arch, is_amd, launch, num_sms
from .moe import MAX_PAIRS, MAX_ROWS, chosen_pairs, fits, pairs_of_expert, pairs_of_tile, sorted_pairs


@triton.jit
def _tile_of_expert(
    x, data, scales, zeros, perm, bias, scale, out, expert, pair, exists, too_many, per_row, N, K, x_stride, data_expert,
    data_stride, scale_expert, scale_k, zero_expert, zero_k, bias_expert, ACTIVATION: tl.constexpr,
    SCALE_ROWS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr,
    COLUMNS: tl.constexpr, ZERO: tl.constexpr, BASE: tl.constexpr, EXTRACT: tl.constexpr, SUBTRACT: tl.constexpr,
    EVEN_K: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile program_id(1) of the results of pairs [BLOCK_M] of one expert; NaN if these are `too_many`."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    GATED: tl.constexpr = ACTIVATION is not None
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n, row = rows_of_tile(tl.program_id(1), N, BLOCK_N, GATED)
    expert = expert.to(tl.int64)
    by_row = row // SCALE_ROWS
    y, _ = products(
        x + pair // per_row * x_stride, exists, data + expert * data_expert + row * data_stride, n < N,
        scales + expert * scale_expert + by_row, zeros if zeros is None else zeros + expert * zero_expert + by_row,
        scale_k, zero_k, perm, None, None, 0, tl.cdiv(K, FIELDS * LANES), K,
        BITS, FIELDS, LANES, RUN, COLUMNS, ZERO, BASE, EXTRACT, SUBTRACT, EVEN_K, DEPTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    y = finished(y, bias if bias is None else bias + expert * bias_expert + row, n < N, DTYPE, ACTIVATION)
    if scale is not None:
        y = rounded(y, DTYPE) * tl.load(scale + pair, mask=exists, other=0.0).to(tl.float32)[None, :]
    y = tl.where(too_many, float("nan"), y)
    to = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = (to < N)[:, None] & exists[None, :]
    tl.store(out + pair[None, :] * N + to[:, None], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_pairs_kernel(
    x, data, scales, zeros, perm, bias, scale, out, experts, num_pairs, per_row, N, K, x_stride, data_expert, data_stride,
    scale_expert, scale_k, zero_expert, zero_k, bias_expert, BY_EXPERT: tl.constexpr, PAIRS: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALE_ROWS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr,
    RUN: tl.constexpr, COLUMNS: tl.constexpr, ZERO: tl.constexpr, BASE: tl.constexpr, EXTRACT: tl.constexpr,
    SUBTRACT: tl.constexpr, EVEN_K: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert, mine, num_rows = pairs_of_expert(experts, num_pairs, BY_EXPERT, PAIRS)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if num_rows <= tl.program_id(2) * BLOCK_M:
        return
    pair = chosen_pairs(mine, m, PAIRS)
    _tile_of_expert(
        x, data, scales, zeros, perm, bias, scale, out, expert, pair, m < num_rows,
        num_rows > tl.num_programs(2) * BLOCK_M, per_row, N, K, x_stride, data_expert, data_stride, scale_expert, scale_k,
        zero_expert, zero_k, bias_expert, ACTIVATION, SCALE_ROWS, BITS, FIELDS, LANES, RUN, COLUMNS, ZERO, BASE, EXTRACT,
        SUBTRACT, EVEN_K, DEPTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _many_pairs_kernel(
    x, data, scales, zeros, perm, bias, scale, out, starts, order, num_experts, per_row, N, K, x_stride, data_expert,
    data_stride, scale_expert, scale_k, zero_expert, zero_k, bias_expert, EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALE_ROWS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr,
    RUN: tl.constexpr, COLUMNS: tl.constexpr, ZERO: tl.constexpr, BASE: tl.constexpr, EXTRACT: tl.constexpr,
    SUBTRACT: tl.constexpr, EVEN_K: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    expert, pair, exists = pairs_of_tile(starts, order, num_experts, EXPERTS, BLOCK_M)
    if expert >= num_experts:
        return
    _tile_of_expert(
        x, data, scales, zeros, perm, bias, scale, out, expert, pair, exists, False, per_row, N, K, x_stride, data_expert,
        data_stride, scale_expert, scale_k, zero_expert, zero_k, bias_expert, ACTIVATION, SCALE_ROWS, BITS, FIELDS, LANES,
        RUN, COLUMNS, ZERO, BASE, EXTRACT, SUBTRACT, EVEN_K, DEPTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def supports(x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether `grouped_linear` takes this call; fp32 it does not."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and fits(x, weight, experts, bias, activation)
        and has_kernel(x, weight)
    )


def grouped_linear(
    x: Tensor,
    weight: QuantizedWeight,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """See `fused.grouped_linear`; only for what `supports` says."""
    pairs, (num_experts, N, K) = len(experts), weight.shape
    N = N if activation is None else N // 2
    if x.stride(1) != 1:
        x = x.contiguous()
    narrow = scale is None or scale.dtype == x.dtype
    dtype = x.dtype if narrow else torch.promote_types(x.dtype, scale.dtype)
    out = torch.empty(pairs, N, dtype=dtype, device=x.device)
    tensors = (x, weight.data, weight.scales, weight.zeros, weight.perm, bias,
               None if scale is None else scale.contiguous(), out)  # fmt: skip
    zeros = (0, 0) if weight.zeros is None else weight.zeros.stride()[:2]
    sizes = (pairs // len(x), N, K, x.stride(0), *weight.data.stride()[:2], *weight.scales.stride()[:2], *zeros,
             0 if bias is None else bias.stride(0))  # fmt: skip
    options = dict(ACTIVATION=activation, **constants(x, weight), num_stages=2 if is_amd(x.device) else 4)
    if pairs <= min(MAX_PAIRS, MAX_ROWS * num_experts):
        _few_pairs(tensors, experts.contiguous(), sizes, weight, max_rows or pairs, options)
    else:
        _many_pairs(tensors, experts, sizes, weight, options)
    return out


def _few_pairs(tensors: tuple, experts: Tensor, sizes: tuple, weight: QuantizedWeight, max_rows: int, options: dict):
    device, pairs, (num_experts, N, _) = weight.device, len(experts), weight.shape
    places = min(pairs, num_experts)
    block = 16 if pairs <= 8 * num_experts or is_amd(device) else 32
    narrow = is_amd(device) or not weight.is_packed or places * triton.cdiv(N, 128) < num_sms(device)
    rows = 64 if narrow else 128
    num_warps = 2 if not weight.is_packed and not is_amd(device) else 4 if block == 16 or narrow else 8
    width = rows if options["ACTIVATION"] is None else rows // 2
    grid = (places, triton.cdiv(sizes[1], width), triton.cdiv(max_rows, block))
    launch(_few_pairs_kernel, grid, *tensors, experts, pairs, *sizes, BY_EXPERT=num_experts <= pairs,
           PAIRS=max(16, triton.next_power_of_2(pairs)), **options, DEPTH=_depth(device, 128), BLOCK_M=block,
           BLOCK_N=rows, num_warps=num_warps)  # fmt: skip


def _many_pairs(tensors: tuple, experts: Tensor, sizes: tuple, weight: QuantizedWeight, options: dict):
    device, pairs, num_experts = weight.device, len(experts), len(weight.data)
    starts, order = sorted_pairs(experts, num_experts)
    block = 128 if pairs > 64 * num_experts and _depth(device, 128) == 128 else 64
    rows = 64 if is_amd(device) else 128
    width = rows if options["ACTIVATION"] is None else rows // 2
    grid = (triton.cdiv(pairs, block) + min(pairs, num_experts), triton.cdiv(sizes[1], width))
    launch(_many_pairs_kernel, grid, *tensors, starts, order, num_experts, *sizes,
           EXPERTS=triton.next_power_of_2(num_experts), **options, DEPTH=64, BLOCK_M=block, BLOCK_N=rows,
           num_warps=8)  # fmt: skip


def _depth(device: torch.device, depth: int) -> int:
    """64 where less fits registers."""
    return 64 if is_amd(device) or arch(device).startswith("sm_8") else depth
