"""Linear layers on fp8 weights, and on int8 weights with int8 inputs: few rows here, many in `fp8_many`.

Inputs are rounded inside the kernel that multiplies, with the norm before it: every program reads the rows of x twice,
from the L2 cache, which costs less than another launch. The norm's scale is a factor of a whole row and leaves what
the row is rounded to alone, so it is applied to the sums (as in `linear`):

    y = r * s * sum_k round8((x * (offset + w))_k / s) W_k
    r = rsqrt(mean(x^2) + eps),  s = max_k |x * (offset + w)| / limit

With an `input_scale` the row must be normed before it is rounded: there the norm is a kernel of its own. GPUs that
cannot multiply fp8 take the weight as it is and do not round the input.

A row's sums are taken in one order whatever the number of rows. Where the columns are too few to occupy the GPU and
long, K is split among programs and a second kernel adds their sums, in order.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import CASTS, Norm
from ..quantized import QuantizedWeight
from . import elementwise, fp8_many
from .eight_bits import (
    PROMOTE,
    depth_within,
    finished,
    first_rows,
    fp8_data,
    is_even,
    num_steps,
    products,
    rounds_to,
    row_peaks,
    stages_for,
)
from .functions import ACTIVATIONS
from .launch import arch, is_amd, launch, num_sms, tuned
from .linear import MAX_ROWS, is_vector, tile
from .quantize import scale_for

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_NARROW = _FLOATS[:2]
_PEAK_TILE = 8192  # elements of x looked at at once: 64 a thread
_SPLIT_DEPTH = 4096  # values of K that are worth a program of their own and a share of another launch
_MAX_SPLITS = 8


@triton.jit(do_not_specialize=("M",))
def _few_rows_kernel(
    x, weight, scales, input_scale, bias, norm_weight, residual, out, M, N, K, x_stride, w_stride, up, scales_next,
    block_rows, columns, residual_stride, eps, offset, inverse_k, split_steps, ROUND_X: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCKED: tl.constexpr, EVEN: tl.constexpr, FLUSH: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With SPLIT, out is [splits, M, N or 2 N] fp32 and what `finished` does is left to another kernel."""
    GATED: tl.constexpr = ACTIVATION is not None
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    x_scale = None
    by_row = None
    if ROUND_X:
        if input_scale is not None:
            x_scale = tl.zeros((BLOCK_M,), tl.float32) + tl.load(input_scale)
        else:
            rows = tl.arange(0, ROWS).to(tl.int64)
            peaks = row_peaks(x + rows * x_stride, rows < M, norm_weight, offset, K, CHUNK)
            x_scale = scale_for(first_rows(peaks, BLOCK_M), weight.dtype.element_ty)
        by_row = x_scale
    scales += n // block_rows
    scales_up = scales
    if GATED:
        scales_up += (N + n) // block_rows - n // block_rows
    first = tl.program_id(1) * split_steps
    last = tl.minimum(first + split_steps, num_steps(K, columns, BLOCK_K))
    y, y_up, squares = products(
        x + m * x_stride, m < M, x_scale, weight + n * w_stride, inside, up, scales, scales_up, scales_next,
        norm_weight, offset, K, columns, first, last, input_scale is not None, GATED, BLOCKED, EVEN, FLUSH,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    exists = (m < M)[:, None] & inside[None, :]
    if SPLIT:
        at = out + (tl.program_id(1) * M + m)[:, None] * (2 * N if GATED else N) + n[None, :]
        if by_row is not None:
            y *= by_row[:, None]
            y_up *= by_row[:, None]
        tl.store(at, y, mask=exists)
        if GATED:
            tl.store(at + N, y_up, mask=exists)
    else:
        DTYPE: tl.constexpr = out.dtype.element_ty
        if norm_weight is not None:
            r = tl.rsqrt(squares * inverse_k + eps)
            by_row = r if by_row is None else r * by_row
        y = finished(y, y_up, by_row, None if BLOCKED else scales, None if BLOCKED else scales_up, bias, n, inside, N,
                     DTYPE, ACTIVATION)  # fmt: skip
        if residual is not None:
            before = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=exists, other=0.0)
            y = y.to(DTYPE).to(tl.float32) + before.to(tl.float32)
        tl.store(out + m[:, None] * N + n[None, :], y.to(DTYPE), mask=exists)


def supports_weight(weight: QuantizedWeight) -> bool:
    """Whether there are kernels for this weight."""
    if weight.zeros is not None or weight.perm is not None:
        return False
    return (weight.kind, weight.activations) in (("fp8", None), ("fp8", "fp8"), ("int8", "int8"))


def supports(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Norm | None, activation: str | None
) -> bool:
    """Whether `linear` takes this call."""
    N, K = weight.shape[-2:]
    return (
        supports_weight(weight)
        and weight.data.dim() == 2
        and x.dtype in _FLOATS
        and x.device == weight.device
        and x.shape[-1] == K
        and (activation is None or activation in ACTIVATIONS and N % 2 == 0)
        and (norm is None or norm.cast in CASTS and (norm.weight is None or is_vector(norm.weight, x, K)))
        and (bias is None or is_vector(bias, x, N))
    )


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `fused.linear`; only for what `supports` says."""
    (N, K), shape = weight.shape, x.shape
    N = N // 2 if activation is not None else N
    x = x.reshape(-1, K)
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.reshape(-1, N)
    rounds = rounds_to(weight, x.device)
    options = dict(activation=activation, residual=residual)
    if not x.numel():
        out = x.new_empty(len(x), N)
    elif len(x) > _max_rows(rounds, x.device) or rounds is None and x.dtype not in _NARROW:
        out = fp8_many.linear(x, weight, bias, rounds, norm=norm, **options)
    else:
        if norm is not None and not _norms_inside(x, weight, norm, rounds):
            x = elementwise.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
            norm = None
        out = _few_rows(x, weight, bias, rounds, norm, **options)
    return out.view(*shape[:-1], N)


def _max_rows(rounds: str | None, device: torch.device) -> int:
    """Beyond, inputs are rounded beforehand. On AMD tiles on their way are in registers, and more rows spill."""
    return 16 if rounds is not None and is_amd(device) else MAX_ROWS


def _norms_inside(x: Tensor, weight: QuantizedWeight, norm: Norm, rounds: str | None) -> bool:
    if norm.weight is None:
        return False
    if rounds is None:  # in fp16 x * w without r may overflow; on AMD it spills with Triton 3.9
        return x.dtype == torch.bfloat16 and not is_amd(x.device)
    return weight.input_scale is None


def _few_rows(x, weight: QuantizedWeight, bias, rounds, norm: Norm | None, *, activation, residual) -> Tensor:
    (N, K), (M, _) = weight.shape, x.shape
    gated = activation is not None
    N = N // 2 if gated else N
    rows, columns = weight.block
    blocked = columns < K
    width, depth = tile(N, K, weight.data.dtype, gated, x.device)
    depth = max(32, min(256, depth // 2))  # a tile of x as deep is held in fp32 on its way to 8 bits
    flush = arch(x.device) == "sm_89" and rounds == "fp8"
    depth = depth_within(columns, min(depth, PROMOTE) if flush else depth) if blocked or flush else depth
    width, depth, splits, num_warps, num_stages = tuned(
        "fp8_linear", columns=width, depth=depth, splits=_splits(triton.cdiv(N, width), K, norm, x.device),
        num_warps=4, num_stages=stages_for(width * depth * (2 if gated else 1), x.device),
    )  # fmt: skip
    columns = min(columns, K)
    steps = K // columns * triton.cdiv(columns, depth) + triton.cdiv(K % columns, depth)
    splits = min(splits, steps)
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = out if splits == 1 else torch.empty(splits, M, len(weight.data), dtype=torch.float32, device=x.device)
    held = 1 if M == 1 else 4 if M <= 4 else 16 if M <= 16 else 32
    launch(_few_rows_kernel, (triton.cdiv(N, width), splits), x, fp8_data(weight), weight.scales,
           weight.input_scale if rounds else None, bias, None if norm is None else norm.weight, residual,
           parts, M, N, K, x.stride(0), weight.data.stride(0), N * weight.data.stride(0), weight.scales.stride(0), rows,
           columns, 0 if residual is None else residual.stride(0), 0.0 if norm is None else norm.eps,
           0.0 if norm is None else norm.offset, 1.0 / K, ceil(steps / splits), ROUND_X=rounds is not None,
           ACTIVATION=activation, BLOCKED=blocked, EVEN=is_even(K, columns, depth), FLUSH=flush, SPLIT=splits > 1,
           ROWS=held, CHUNK=min(_PEAK_TILE // held, max(32, triton.next_power_of_2(K))),
           BLOCK_M=16 if M <= 16 else 32, BLOCK_N=width, BLOCK_K=depth, num_warps=num_warps,
           num_stages=num_stages)  # fmt: skip
    if splits > 1:
        fp8_many.finish(parts, None, None if blocked else weight, bias, out, activation=activation, residual=residual)
    return out


def _splits(programs: int, K: int, norm: Norm | None, device: torch.device) -> int:
    """Programs that share a tile's columns: 1 if there are enough without, and with a norm, whose sum is of all K."""
    if norm is not None:
        return 1
    return max(1, min(_MAX_SPLITS, num_sms(device) // programs, K // _SPLIT_DEPTH))
