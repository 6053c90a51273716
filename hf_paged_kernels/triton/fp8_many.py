"""Linear layers on 8-bit weights for many rows: inputs are rounded beforehand, by the norm if there is one.

torch multiplies (cuBLAS, CUTLASS) where it can: int8, and fp8 with one scale for a row or column. Blocks of scales
take a kernel of their own. fp8 weights with inputs that are not rounded are dequantized for the call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..norm import Norm
from ..quantized import DTYPES, QuantizedWeight
from . import elementwise
from .dequantize import dequantize
from .eight_bits import PROMOTE, depth_within, finished, is_even, num_steps, products, rounded_to_8_bits, row_peaks
from .launch import arch, interpreting, is_amd, launch, tuned
from .quantize import scale_for

_CHUNK = 4096
_GROUP = 8  # tiles of rows that share the columns they read: what they need at once stays in the L2 cache
_INT_MM_ROWS = 17  # torch._int_mm takes no fewer


@triton.jit
def _quantize_kernel(x, input_scale, values, scale_out, K, x_stride, CHUNK: tl.constexpr):
    """A row of x to 8 bits, with `input_scale` or a scale of its own."""
    DTYPE: tl.constexpr = values.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    if input_scale is not None:
        scale = tl.zeros((1,), tl.float32) + tl.load(input_scale)
    else:
        scale = scale_for(row_peaks(x + row * x_stride, row >= 0, None, 0.0, K, CHUNK), DTYPE)
    tl.store(scale_out + row, scale)
    k = tl.arange(0, CHUNK)
    for start in range(0, K, CHUNK):
        inside = (start + k < K)[None, :]
        part = tl.load(x + (row * x_stride)[:, None] + (start + k)[None, :], mask=inside, other=0.0)
        q = rounded_to_8_bits(part.to(tl.float32), scale, DTYPE, input_scale is not None)
        tl.store(values + (row * K)[:, None] + (start + k)[None, :], q, mask=inside)


@triton.jit(do_not_specialize=("M",))
def _many_rows_kernel(
    x, x_scale, weight, scales, bias, residual, out, M, N, K, x_stride, w_stride, up, scales_next, block_rows, columns,
    residual_stride, ACTIVATION: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr, FLUSH: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    GATED: tl.constexpr = ACTIVATION is not None
    tiles_m = tl.cdiv(M, BLOCK_M)
    of_group = GROUP * tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // of_group * GROUP
    group = tl.minimum(tiles_m - first_m, GROUP)
    within = tl.program_id(0) % of_group
    m = (first_m + within % group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // group).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    scales += n // block_rows
    scales_up = scales
    if GATED:
        scales_up += (N + n) // block_rows - n // block_rows
    y, y_up, _ = products(
        x + m * x_stride, m < M, None, weight + n * w_stride, inside, up, scales, scales_up, scales_next, None, 0.0,
        K, columns, 0, num_steps(K, columns, BLOCK_K), False, GATED, BLOCKED, EVEN, FLUSH,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    by_row = tl.load(x_scale + m, mask=m < M, other=0.0)
    y = finished(y, y_up, by_row, None if BLOCKED else scales, None if BLOCKED else scales_up, bias, n, inside, N,
                 DTYPE, ACTIVATION)  # fmt: skip
    exists = (m < M)[:, None] & inside[None, :]
    if residual is not None:
        before = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=exists, other=0.0)
        y = y.to(DTYPE).to(tl.float32) + before.to(tl.float32)
    tl.store(out + m[:, None] * N + n[None, :], y.to(DTYPE), mask=exists)


@triton.jit(do_not_specialize=("M",))
def _finish_kernel(
    parts, x_scale, scales, bias, residual, out, M, N, block_rows, residual_stride, ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    WIDTH: tl.constexpr = 1 if ACTIVATION is None else 2
    m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    n = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    y = tl.zeros((1, BLOCK), tl.float32)
    y_up = tl.zeros((1, BLOCK), tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts + (split * M + m)[:, None] * (WIDTH * N) + n[None, :]
        y += tl.load(at, mask=inside[None, :], other=0).to(tl.float32)
        if WIDTH == 2:
            y_up += tl.load(at + N, mask=inside[None, :], other=0).to(tl.float32)
    by_row = None
    if x_scale is not None:
        by_row = tl.load(x_scale + m)
    scales_up = None
    if scales is not None:
        scales_up = scales + (N + n) // block_rows
        scales += n // block_rows
    y = finished(y, y_up, by_row, scales, scales_up, bias, n, inside, N, DTYPE, ACTIVATION)
    if residual is not None:
        before = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside[None, :], other=0.0)
        y = y.to(DTYPE).to(tl.float32) + before.to(tl.float32)
    tl.store(out + m[:, None] * N + n[None, :], y.to(DTYPE), mask=inside[None, :])


def linear(x: Tensor, weight: QuantizedWeight, bias, rounds: str | None, *, norm, activation, residual) -> Tensor:
    """x [M, K] -> [M, N]: see `fused.linear`. `rounds`: the type that x is rounded to."""
    if rounds is None:
        return _dequantized(x, weight, bias, norm, activation, residual)
    values, scale = _rounded(x, weight, rounds, norm)
    out = x.new_empty(len(x), len(weight.data) // (1 if activation is None else 2))
    if rounds == "int8" and _torch_multiplies_int8(values, weight):
        sums = torch._int_mm(values, weight.data.t())
        finish(sums[None], scale, weight, bias, out, activation=activation, residual=residual)
        return out
    if rounds == "fp8" and _torch_multiplies_fp8(values, weight, x.dtype):
        y = scaled_mm(values, scale, weight, bias, x.dtype)
        y = y if activation is None else elementwise.act_and_mul(y, activation)
        return y if residual is None else y.add_(residual)
    _multiply(values, scale, weight, bias, out, activation, residual)
    return out


def _rounded(x: Tensor, weight: QuantizedWeight, rounds: str, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(8-bit values [M, K], fp32 scales [M, 1]) of x, normed."""
    if norm is not None:
        to = rounds if weight.input_scale is None else None
        x = elementwise.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, quantize=to)
    return x if isinstance(x, tuple) else quantize(x, rounds, weight.input_scale)


def quantize(x: Tensor, to: str, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (8-bit values [M, K], fp32 scales [M, 1]): `ref.quantized.rounded_rows` is their product."""
    M, K = x.shape
    values = torch.empty(M, K, dtype=DTYPES[to], device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    chunk = min(_CHUNK, triton.next_power_of_2(K))
    launch(_quantize_kernel, (M,), x, input_scale, values, scale, K, x.stride(0), CHUNK=chunk,
           num_warps=max(1, min(8, chunk // 512)))  # fmt: skip
    return values, scale


def _dequantized(x: Tensor, weight: QuantizedWeight, bias, norm: Norm | None, activation, residual) -> Tensor:
    if norm is not None:
        x = elementwise.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    y = F.linear(x, dequantize(weight, x.dtype), bias)
    y = y if activation is None else elementwise.act_and_mul(y, activation)
    return y if residual is None else y.add_(residual)


def _torch_multiplies_int8(values: Tensor, weight: QuantizedWeight) -> bool:
    N, K = weight.shape
    return (
        _on_nvidia(values) and weight.block[1] >= K and len(values) >= _INT_MM_ROWS and N % 8 == 0 and K % 16 == 0
        and weight.data.stride(0) % 16 == 0
    )  # fmt: skip


def _torch_multiplies_fp8(values: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Scales by rows and columns are for Hopper in every release since 2.6, and give bf16."""
    N, K = weight.shape
    return (
        _on_nvidia(values) and arch(values.device) == "sm_90" and dtype == torch.bfloat16 and weight.block[1] >= K
        and N % 16 == 0 and K % 16 == 0 and weight.data.stride(0) % 16 == 0
    )  # fmt: skip


def _on_nvidia(values: Tensor) -> bool:
    return values.device.type == "cuda" and not interpreting() and torch.version.hip is None


def scaled_mm(
    values: Tensor, scale: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """fp8 values [M, K] with scales [M, 1] times weights with a scale for each row or for all -> [M, N]."""
    by_column = weight.scales.float()
    if weight.block[0] > 1:
        by_column = by_column.repeat_interleave(weight.block[0], 1).narrow(1, 0, len(weight.data))
    # Without fast accumulation: sums go to fp32 after every few products.
    return torch._scaled_mm(
        values, weight.data.t(), scale_a=scale, scale_b=by_column.contiguous(), bias=bias, out_dtype=dtype,
        use_fast_accum=False,
    )  # fmt: skip


def _multiply(values, scale, weight: QuantizedWeight, bias, out, activation, residual) -> None:
    (M, N), K = out.shape, values.shape[1]
    rows, columns = weight.block
    blocked = columns < K
    gated = activation is not None
    amd = is_amd(values.device)
    block_m, block_n, depth, num_warps, num_stages = tuned(
        "fp8_many", rows=64 if M <= 64 or amd else 128, columns=64 if gated or amd else 128,
        depth=depth_within(columns, PROMOTE), num_warps=4 if amd else 8, num_stages=2 if amd else 4,
    )  # fmt: skip
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)
    launch(_many_rows_kernel, grid, values, scale, weight.data, weight.scales, bias, residual, out, M, N, K,
           values.stride(0), weight.data.stride(0), N * weight.data.stride(0), weight.scales.stride(0), rows,
           columns if blocked else K, 0 if residual is None else residual.stride(0), ACTIVATION=activation,
           BLOCKED=blocked, EVEN=is_even(K, columns, depth), FLUSH=values.dtype != torch.int8, GROUP=_GROUP,
           BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=depth, num_warps=num_warps, num_stages=num_stages)  # fmt: skip


def finish(parts: Tensor, scale: Tensor | None, weight: QuantizedWeight | None, bias, out, *, activation, residual):
    """out [M, N] from sums [splits, M, N or 2 N], added, times `scale` [M, 1] and scales of the weight's rows."""
    M, N = out.shape
    block = min(1024, triton.next_power_of_2(N))
    launch(_finish_kernel, (M, triton.cdiv(N, block)), parts, scale, None if weight is None else weight.scales, bias,
           residual, out, M, N, 1 if weight is None else weight.block[0],
           0 if residual is None else residual.stride(0), ACTIVATION=activation, SPLITS=len(parts), BLOCK=block,
           num_warps=4)  # fmt: skip
