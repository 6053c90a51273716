"""Linear layers on weights that are whole numbers with scales: products of packed values, or of dequantized weights.

Few rows of x take one kernel that streams the packed weight once (see `int_tile`), with the norm before it and what
follows inside, as `triton.linear`. A GPU has more SMs than the weight has tiles of rows, so programs share a tile, each
with a part of the inputs. The last of them to end adds the parts up, in their order, and finishes the tile: no
second launch, and the same bits whichever comes last. How the inputs are parted depends on the weight alone, so a row's
bits depend on no other row's.

Beyond, where the weight's bytes no longer matter, it is dequantized for the call and multiplied by torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..norm import CASTS, Norm
from ..quantized import BITS, FIELDS, LANES, QuantizedWeight
from .dequantize import dequantize
from .functions import ACTIVATIONS, rounded
from .int_tile import finished, products, rows_of_tile
from .int_values import extraction, subtraction
from .launch import arch, is_amd, launch, num_sms, tuned
from .linear import is_vector

FEW_ROWS = 32  # up to these the norm and the activation are inside, and a row's bits are the same in any company
MAX_ROWS = 512  # beyond, torch on the dequantized weight
_WARPS = 8  # on every SM: fewer cannot keep it busy taking values apart
_MIN_BLOCKS = 4  # of a program: what it has on its way before it computes
_MAX_SPLITS = 8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=("M",))
def _int_linear_kernel(
    x, data, scales, zeros, perm, bias, norm_weight, residual, out, parts, part_squares, counters,
    M, N, K, x_stride, data_stride, scale_k, zero_k, residual_stride, eps, offset, inverse_k,
    ACTIVATION: tl.constexpr, SCALE_ROWS: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr,
    LANES: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr, ZERO: tl.constexpr, BASE: tl.constexpr,
    EXTRACT: tl.constexpr, SUBTRACT: tl.constexpr, EVEN_K: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile: BLOCK_N rows of the weight, with an activation half of them from each half; see `_int_linear`."""
    GATED: tl.constexpr = ACTIVATION is not None
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n, row = rows_of_tile(tl.program_id(0), N, BLOCK_N, GATED)
    slot = tl.arange(0, BLOCK_M)
    m = tl.program_id(2).to(tl.int64) * BLOCK_M + slot
    split = tl.program_id(1)
    blocks = tl.cdiv(K, FIELDS * LANES)
    y, squares = products(
        x + m * x_stride, m < M, data + row * data_stride, n < N, scales + row // SCALE_ROWS,
        zeros if zeros is None else zeros + row // SCALE_ROWS, scale_k, zero_k, perm, norm_weight, offset,
        split * blocks // SPLITS, (split + 1) * blocks // SPLITS, K,
        BITS, FIELDS, LANES, RUN, COLUMNS, ZERO, BASE, EXTRACT, SUBTRACT, EVEN_K, DEPTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SPLITS > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        at = parts + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + slot[None, :] * BLOCK_N
        at += tl.arange(0, BLOCK_N)[:, None]
        if norm_weight is not None:
            at_squares = part_squares + tile * (SPLITS * BLOCK_M) + slot
        tl.store(at + split * (BLOCK_M * BLOCK_N), y, mask=(m < M)[None, :])
        if norm_weight is not None:
            tl.store(at_squares + split * BLOCK_M, squares)
        tl.debug_barrier()  # all threads have stored; who then counts last sees what all programs have
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if BLOCK_M * BLOCK_N > 2048:  # too many to have all parts of them on their way at once
            for part in tl.range(SPLITS, loop_unroll_factor=2):
                y += tl.load(at + part * (BLOCK_M * BLOCK_N), mask=(m < M)[None, :], other=0.0, cache_modifier=".cg")
        else:
            for part in tl.static_range(SPLITS):
                y += tl.load(at + part * (BLOCK_M * BLOCK_N), mask=(m < M)[None, :], other=0.0, cache_modifier=".cg")
        if norm_weight is not None:
            squares = tl.zeros((BLOCK_M,), tl.float32)
            for part in tl.static_range(SPLITS):
                squares += tl.load(at_squares + part * BLOCK_M, cache_modifier=".cg")
        tl.store(counters + tile, 0)  # for the next launch
    if norm_weight is not None:
        y *= tl.rsqrt(squares * inverse_k + eps)[None, :]
    y = finished(y, bias if bias is None else bias + row, n < N, DTYPE, ACTIVATION)
    to = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = (to < N)[:, None] & (m < M)[None, :]
    if residual is not None:
        before = tl.load(residual + m[None, :] * residual_stride + to[:, None], mask=inside)
        y = rounded(y, DTYPE) + before.to(tl.float32)
    tl.store(out + m[None, :] * N + to[:, None], y.to(DTYPE), mask=inside)


def supports(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Norm | None, activation: str | None
) -> bool:
    """Whether `linear` takes this call and does all of it well."""
    N, K = weight.shape[-2:]
    if not (x.dtype in _FLOATS and x.device == weight.device and weight.data.dim() == 2 and x.shape[-1] == K):
        return False
    if bias is not None and not is_vector(bias, x, N):
        return False
    if norm is None and activation is None:
        return True
    if x.numel() > FEW_ROWS * K or not has_kernel(x, weight):
        return False
    if activation is not None and (activation not in ACTIVATIONS or N % 2):
        return False
    # As in triton.linear: the product before it is scaled may overflow in fp16.
    return norm is None or x.dtype == torch.bfloat16 and norm.cast in CASTS and is_vector(norm.weight, x, K)


def has_kernel(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether a product with the packed weight is possible."""
    return x.dtype != torch.float32 and layout(weight, x.device) is not None


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `fused.linear`, which checks the arguments; only for what `supports` says."""
    (N, K), shape = weight.shape, x.shape
    N = N // 2 if activation is not None else N
    x = x.reshape(-1, K)
    if x.numel() > MAX_ROWS * K or not has_kernel(x, weight):
        x = x if weight.perm is None else x.index_select(-1, weight.perm)
        y = F.linear(x, dequantize(weight, x.dtype), bias).view(*shape[:-1], N)
        return y if residual is None else y.add_(residual)
    if x.stride(1) != 1:
        x = x.contiguous()
    residual = None if residual is None else residual.reshape(-1, N)
    out = torch.empty((*shape[:-1], N), dtype=x.dtype, device=x.device)
    if out.numel():
        _int_linear(x, weight, bias, norm, activation, residual, out)
    return out


def _int_linear(x, weight, bias, norm, activation, residual, out) -> None:
    """Launch the kernel; x [M, K], residual and out [M, N].

    With `parts` fp32 [tile, split, BLOCK_M, BLOCK_N] programs that share a tile hand their sums to the last of them,
    which `counters`, int32, tell: 0 for every tile before and after.
    """
    (M, K), N, device = x.shape, out.shape[-1], x.device
    rows, block, depth, splits, num_warps, num_stages = tile(M, weight, device)
    grid = (triton.cdiv(N, rows if activation is None else rows // 2), splits, triton.cdiv(M, block))
    parts = squares = counts = None
    if splits > 1:
        parts = torch.empty(grid[0] * grid[2], splits, block, rows, dtype=torch.float32, device=device)
        squares = None if norm is None else parts.new_empty(grid[0] * grid[2], splits, block)
        counts = counters(grid[0] * grid[2], device)
    launch(_int_linear_kernel, grid, x, weight.data, weight.scales, weight.zeros, weight.perm, bias,
           None if norm is None else norm.weight, residual, out, parts, squares, counts, M, N, K, x.stride(0),
           weight.data.stride(0), weight.scales.stride(0), 0 if weight.zeros is None else weight.zeros.stride(0),
           0 if residual is None else residual.stride(0), 0.0 if norm is None else norm.eps,
           None if norm is None or not norm.offset else norm.offset, 1.0 / K, ACTIVATION=activation, SPLITS=splits,
           **constants(x, weight), DEPTH=depth, BLOCK_M=block, BLOCK_N=rows,
           num_warps=num_warps, num_stages=num_stages)  # fmt: skip


def layout(weight: QuantizedWeight, device: torch.device) -> tuple[int, int, int, int] | None:
    """(fields of a step, values in each, as many fields share scales at least, columns that do) of the kernel.

    None if a scale ends amid the values of a field, for which there is no kernel.
    """
    columns = weight.block[1] if weight.block[1] < weight.in_features else 1 << 30
    if weight.is_packed:
        shared = math.gcd(columns, LANES * FIELDS[weight.kind]) // LANES
        return (FIELDS[weight.kind], LANES, shared, columns) if columns % LANES == 0 else None
    shared = math.gcd(columns, 64 if is_amd(device) else 128)
    return (1, shared, 1, columns) if shared >= 32 else None


def constants(x: Tensor, weight: QuantizedWeight) -> dict[str, object]:
    """What `products` is told about the weight, by its names."""
    fields, lanes, run, columns = layout(weight, x.device)
    extract, base, subtract = "", 0, ""
    if _has_ptx(x.device):
        (extract, base), subtract = extraction(weight.kind, x.dtype), subtraction(x.dtype)
    return dict(
        SCALE_ROWS=weight.block[0], BITS=BITS[weight.kind], FIELDS=fields, LANES=lanes, RUN=run, COLUMNS=columns,
        ZERO=weight.zero_point(), BASE=base, EXTRACT=extract, SUBTRACT=subtract,
        EVEN_K=weight.in_features % (fields * lanes) == 0,
    )  # fmt: skip


def _has_ptx(device: torch.device) -> bool:
    return arch(device).startswith("sm_")


class Tile(NamedTuple):
    """How a call is divided among programs; `products` has the terms."""

    rows: int
    block: int
    depth: int
    splits: int
    num_warps: int
    num_stages: int


def tile(M: int, weight: QuantizedWeight, device: torch.device) -> Tile:
    """The tile for M rows of x. Up to FEW_ROWS the order of sums depends on the weight alone."""
    fields, lanes = layout(weight, device)[:2]
    blocks = triton.cdiv(weight.in_features, fields * lanes)
    old, amd = arch(device).startswith("sm_8"), is_amd(device)  # there less fits registers
    if M > FEW_ROWS:
        rows, block, depth, num_warps = 128, 64 if M <= 64 or old or amd else 128, 64, 8
    else:
        # The bytes of int8 reach their registers in fours only as operands of the instruction of one warp.
        rows, num_warps = (64, 4) if amd else (128, 4 if M <= 16 else 8) if weight.is_packed else (64, 2)
        block, depth = 16 if M <= 16 else 32, 64 if old or amd else 128
    programs = triton.cdiv(M, block) if M > FEW_ROWS else 1
    programs *= triton.cdiv(weight.shape[-2], rows)
    warps = num_warps if M > FEW_ROWS else rows // 32
    splits = 1 if amd else _WARPS * num_sms(device) // (warps * programs)
    splits = max(1, min(splits, blocks // _MIN_BLOCKS, _MAX_SPLITS))
    num_stages = 2 if amd else 4
    chosen = dict(rows=rows, block=block, depth=depth, splits=splits, num_warps=num_warps, num_stages=num_stages)
    return Tile(*tuned("int_linear", **chosen))


# Of a device and stream: all there ever were, for graphs may hold any of them.
_counters: dict[tuple[torch.device, int], list[Tensor]] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """Zeros int32 [count or more] of the current stream: launches on it find and leave them 0, one after the other.

    What a graph records on a stream that has none yet gets its own, which it sets to 0 each time it runs.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _counters.setdefault((device, stream), [])
    if kept and len(kept[-1]) >= count:
        return kept[-1]
    new = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        kept.append(new)
    return new
