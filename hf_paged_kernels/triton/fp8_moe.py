"""Experts on fp8 weights, and on int8 weights with int8 inputs.

Few pairs of tokens and experts take a kernel that finds its rows itself, as in `moe`, and rounds them to 8 bits on the
way. Many are sorted by expert, without the host being asked for anything: tiles of rows belong to one expert each, and
there are as many programs as there could be tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import QuantizedWeight
from .eight_bits import (
    PROMOTE,
    depth_within,
    finished,
    fp8_data,
    is_even,
    num_steps,
    products,
    rounds_to,
    row_peaks,
    stages_for,
)
from .fp8_many import quantize
from .functions import rounded
from .launch import arch, is_amd, launch
from .linear import tile
from .moe import MAX_PAIRS, MAX_ROWS, chosen_pairs, fits, pairs_of_expert, pairs_of_tile, sorted_pairs
from .quantize import scale_for

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PEAK_TILE = 8192


@triton.jit
def _tile_of_expert(
    x, x_scale, by_row, weight, scales, bias, scale, out, expert, pair, exists, n, per_row, N, K, x_stride, w_expert,
    w_stride, up, scales_expert, scales_next, block_rows, columns, bias_expert, DTYPE: tl.constexpr, CLIP: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr, FLUSH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns n of the results of pairs [BLOCK_M] of one expert, fp32. x_scale and by_row as in `eight_bits`."""
    GATED: tl.constexpr = ACTIVATION is not None
    inside = n < N
    expert = expert.to(tl.int64)
    scales += expert * scales_expert + n // block_rows
    scales_up = scales
    if GATED:
        scales_up += (N + n) // block_rows - n // block_rows
    y, y_up, _ = products(
        x + pair // per_row * x_stride, exists, x_scale, weight + expert * w_expert + n * w_stride, inside, up, scales,
        scales_up, scales_next, None, 0.0, K, columns, 0, num_steps(K, columns, BLOCK_K), CLIP, GATED,
        BLOCKED, EVEN, FLUSH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        bias += expert * bias_expert
    y = finished(y, y_up, by_row, None if BLOCKED else scales, None if BLOCKED else scales_up, bias, n, inside, N,
                 DTYPE, ACTIVATION)  # fmt: skip
    if scale is not None:
        y = rounded(y, DTYPE) * tl.load(scale + pair, mask=exists, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def _few_pairs_kernel(
    x, weight, scales, input_scale, experts, bias, scale, out, num_pairs, per_row, N, K, x_stride, w_expert, w_stride,
    up, scales_expert, scales_next, block_rows, columns, bias_expert, ROUND_X: tl.constexpr, DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr, FLUSH: tl.constexpr, BY_EXPERT: tl.constexpr,
    PAIRS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, mine, num_rows = pairs_of_expert(experts, num_pairs, BY_EXPERT, PAIRS)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if num_rows <= tl.program_id(2) * BLOCK_M:
        return
    pair = chosen_pairs(mine, m, PAIRS)
    exists = m < num_rows
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_scale = None
    if ROUND_X:
        if input_scale is not None:
            x_scale = tl.zeros((BLOCK_M,), tl.float32) + tl.load(input_scale)
        else:
            peaks = row_peaks(x + pair // per_row * x_stride, exists, None, 0.0, K, CHUNK)
            x_scale = scale_for(peaks, weight.dtype.element_ty)
    y = _tile_of_expert(
        x, x_scale, x_scale, weight, scales, bias, scale, out, expert, pair, exists, n, per_row, N, K, x_stride,
        w_expert, w_stride, up, scales_expert, scales_next, block_rows, columns, bias_expert, DTYPE,
        input_scale is not None, ACTIVATION, BLOCKED, EVEN, FLUSH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if num_rows > tl.num_programs(2) * BLOCK_M:  # more than `max_rows` promised: not a number rather than left out
        y += float("nan")
    tl.store(out + pair[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=exists[:, None] & (n < N)[None, :])


@triton.jit
def _many_pairs_kernel(
    x, x_scale, weight, scales, starts, order, bias, scale, out, num_experts, per_row, N, K, x_stride, w_expert,
    w_stride, up, scales_expert, scales_next, block_rows, columns, bias_expert, DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr, FLUSH: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, pair, exists = pairs_of_tile(starts, order, num_experts, EXPERTS, BLOCK_M)
    if expert >= num_experts:
        return
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    by_row = None
    if x_scale is not None:
        by_row = tl.load(x_scale + pair // per_row, mask=exists, other=0.0)
    y = _tile_of_expert(
        x, None, by_row, weight, scales, bias, scale, out, expert, pair, exists, n, per_row, N, K, x_stride, w_expert,
        w_stride, up, scales_expert, scales_next, block_rows, columns, bias_expert, DTYPE, False, ACTIVATION, BLOCKED,
        EVEN, FLUSH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(out + pair[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=exists[:, None] & (n < N)[None, :])


def supports(
    x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None, activation: str | None
) -> bool:
    """Whether `grouped_linear` takes this call; of such weights as `fp8_linear` takes."""
    return x.dtype in _TYPES and fits(x, weight, experts, bias, activation)


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
    if x.stride(1) != 1:
        x = x.contiguous()
    pairs, num_experts, size = len(experts), len(weight.data), weight.data.shape[1]
    narrow = scale is None or scale.dtype == x.dtype
    dtype = x.dtype if narrow else torch.promote_types(x.dtype, scale.dtype)
    out = torch.empty(pairs, size if activation is None else size // 2, dtype=dtype, device=x.device)
    scale = None if scale is None else scale.contiguous()
    few = pairs <= min(MAX_PAIRS, MAX_ROWS * num_experts)
    if is_amd(x.device) and activation is not None and rounds_to(weight, x.device) is None:
        few = False  # its scalars spill
    run = _few_pairs if few else _many_pairs
    run(x, weight, experts.contiguous(), bias, scale, out, activation, max_rows)
    return out


def _few_pairs(x, weight: QuantizedWeight, experts, bias, scale, out, activation, max_rows) -> None:
    rounds = rounds_to(weight, x.device)
    pairs, (num_experts, _, K) = len(experts), weight.shape
    gated, places = activation is not None, min(pairs, num_experts)
    columns, depth = tile(out.shape[1], K, weight.data.dtype, gated, x.device, times=places)
    block = 16 if pairs <= 8 * num_experts or is_amd(x.device) else 32
    grid = (places, triton.cdiv(out.shape[1], columns), triton.cdiv(max_rows or pairs, block))
    limit = 64 if rounds is None and block > 16 else PROMOTE if arch(x.device) == "sm_89" else 256
    if rounds == "int8" and arch(x.device) == "sm_90":
        limit = 64  # deeper tiles spill with Triton 3.9
    options = _options(x, weight, activation, out, columns, min(limit, depth // 2), block)
    launch(_few_pairs_kernel, grid, x, fp8_data(weight), weight.scales, weight.input_scale if rounds else None, experts,
           bias, scale, out, pairs, pairs // len(x), *_sizes(x, weight, bias, out), ROUND_X=rounds is not None,
           FLUSH=arch(x.device) == "sm_89" and rounds == "fp8", BY_EXPERT=num_experts <= pairs,
           PAIRS=max(16, triton.next_power_of_2(pairs)),
           CHUNK=min(_PEAK_TILE // block, max(32, triton.next_power_of_2(K))), **options, num_warps=4,
           num_stages=stages_for(columns * options["BLOCK_K"] * (2 if gated else 1), x.device))  # fmt: skip


def _many_pairs(x, weight: QuantizedWeight, experts, bias, scale, out, activation, max_rows) -> None:
    rounds, amd = rounds_to(weight, x.device), is_amd(x.device)
    pairs, (num_experts, _, K) = len(experts), weight.shape
    per_row, dtype = pairs // len(x), _TYPES[x.dtype]
    starts, order = sorted_pairs(experts, num_experts)
    values, x_scale = (x, None) if rounds is None else quantize(x, rounds, weight.input_scale)
    small = pairs <= 64 * num_experts or amd or rounds is None
    narrow = activation is not None or amd or rounds is None or arch(x.device) in ("sm_80", "sm_86", "sm_100")
    block, width = 64 if small else 128, 32 if rounds is None and activation is not None else 64 if narrow else 128
    limit = PROMOTE if rounds is not None else 64 if x.dtype != torch.float32 else 32
    options = _options(values, weight, activation, out, width, limit, block) | {"DTYPE": dtype}
    grid = (triton.cdiv(pairs, block) + min(pairs, num_experts), triton.cdiv(out.shape[1], width))
    launch(_many_pairs_kernel, grid, values, x_scale, fp8_data(weight), weight.scales, starts, order, bias, scale, out,
           num_experts, per_row, *_sizes(values, weight, bias, out), FLUSH=rounds == "fp8",
           EXPERTS=triton.next_power_of_2(num_experts), **options, num_warps=4 if amd else 8,
           num_stages=2 if amd else 3)  # fmt: skip


def _sizes(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor) -> tuple[int, ...]:
    """Both kernels' arguments from N on."""
    N, K = out.shape[1], weight.in_features
    data, scales, (rows, columns) = weight.data, weight.scales, weight.block
    bias_expert = 0 if bias is None else bias.stride(0)
    return (N, K, x.stride(0), *data.stride()[:2], N * data.stride(1), *scales.stride()[:2], rows, min(columns, K),
            bias_expert)  # fmt: skip


def _options(x: Tensor, weight: QuantizedWeight, activation, out: Tensor, width: int, limit: int, block: int) -> dict:
    """Constants of both kernels, with tiles no deeper than `limit` and within a block of scales."""
    K, columns = weight.in_features, weight.block[1]
    limit = max(32, limit)
    depth = depth_within(columns, limit) if columns < K else min(limit, max(32, triton.next_power_of_2(K)))
    return dict(DTYPE=_TYPES.get(x.dtype), ACTIVATION=activation, BLOCKED=columns < K, EVEN=is_even(K, columns, depth),
                BLOCK_M=block, BLOCK_N=width, BLOCK_K=depth)  # fmt: skip
