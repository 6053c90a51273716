"""The linear layers of mixture-of-experts layers for small batches: every expert that is asked for is read once.

Nothing is sorted, and what is launched does not depend on the routing, so that a CUDA graph holds any routing. A
program computes a few columns of one expert, for up to BLOCK_M of the rows that chose it: it finds them among all
(token, expert) pairs itself, and ends at once if there are none. There is a program for every expert, or, where pairs
are fewer, for every pair, which then works for its expert only if no pair before it does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import QuantizedWeight
from .functions import ACTIVATIONS, activate, rounded
from .launch import is_amd, launch
from .linear import products, stages, tile

# Beyond, torch's grouped_mm: experts have rows enough to keep it busy, and here every program looks at all pairs.
MAX_PAIRS = 512
MAX_ROWS = 32  # of an expert on average
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def pairs_of_expert(experts, num_pairs, BY_EXPERT: tl.constexpr, PAIRS: tl.constexpr):
    """(the expert of program (place, ...), which of PAIRS pairs are its, how many: 0 if an earlier program has them)."""
    pair = tl.arange(0, PAIRS)
    of_pair = tl.load(experts + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    expert = tl.program_id(0)
    if not BY_EXPERT:
        expert = tl.load(experts + tl.program_id(0)).to(tl.int32)
    mine = of_pair == expert
    num_rows = tl.sum(mine.to(tl.int32), axis=0)
    if not BY_EXPERT:
        num_rows = tl.where(tl.min(tl.where(mine, pair, PAIRS), axis=0) == tl.program_id(0), num_rows, 0)
    return expert, mine, num_rows


@triton.jit
def chosen_pairs(mine, m, PAIRS: tl.constexpr):
    """The numbers (int64) of the m-th [BLOCK_M] of the pairs that `mine` [PAIRS] marks."""
    pair = tl.arange(0, PAIRS)
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    chosen = mine[None, :] & (rank[None, :] == m[:, None])
    return tl.sum(tl.where(chosen, pair[None, :], 0), axis=1).to(tl.int64)


@triton.jit
def pairs_of_tile(starts, order, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(the expert of program (tile, ...), its pairs [BLOCK_M], int64, which exist) of what `sorted_pairs` gives.

    There are fewer tiles than programs: beyond, the expert is `num_experts` or more.
    """
    e = tl.arange(0, EXPERTS)
    start = tl.load(starts + e, mask=e < num_experts, other=0)
    tiles = tl.cdiv(tl.load(starts + e + 1, mask=e < num_experts, other=0) - start, BLOCK_M)
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((ends <= tl.program_id(0)).to(tl.int32), axis=0)
    is_one = expert < num_experts
    before = tl.sum(tl.where(e == expert, ends - tiles, 0), axis=0)
    place = (tl.program_id(0) - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    place += tl.load(starts + expert, mask=is_one, other=0)
    exists = place < tl.load(starts + expert + 1, mask=is_one, other=0)
    return expert, tl.load(order + place, mask=exists, other=0).to(tl.int64), exists


@triton.jit
def _grouped_linear_kernel(
    x, weight, experts, bias, scale, out, num_pairs, per_row, N, K, x_stride, w_expert, w_n, w_k, up, bias_expert,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, EXPERTS: tl.constexpr, BY_EXPERT: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    GATED: tl.constexpr = ACTIVATION is not None
    expert, mine, num_rows = pairs_of_expert(experts, num_pairs, BY_EXPERT, PAIRS)
    if EXPERTS is not None:  # only so many of those asked for are there
        num_rows = tl.where(expert < EXPERTS, num_rows, 0)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if num_rows <= tl.program_id(2) * BLOCK_M:
        return
    row = chosen_pairs(mine, m, PAIRS)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = weight + expert.to(tl.int64) * w_expert + n * w_n
    y, y_up, _ = products(x + row // per_row * x_stride, m < num_rows, w_rows, n < N, up, None, 0.0, K, w_k,
                          GATED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if bias is not None:
        at = bias + expert.to(tl.int64) * bias_expert + n
        y += tl.load(at, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            y_up += tl.load(at + N, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        y = rounded(activate(rounded(y, DTYPE), ACTIVATION), DTYPE) * rounded(y_up, DTYPE)
    if scale is not None:
        y = rounded(y, DTYPE) * tl.load(scale + row, mask=m < num_rows, other=0.0).to(tl.float32)[:, None]
    if num_rows > tl.num_programs(2) * BLOCK_M:  # more than `max_rows` promised: not a number rather than left out
        y += float("nan")
    inside = (m < num_rows)[:, None] & (n < N)[None, :]
    tl.store(out + row[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=inside)


def sorted_pairs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(where an expert's pairs begin in the order [E + 1], pairs ordered by expert [S]), without asking the host."""
    by_expert, order = experts.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=experts.device, dtype=by_expert.dtype)
    return torch.searchsorted(by_expert, bounds, out_int32=True), order


def supports(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether `grouped_linear` takes this call and is meant for it."""
    return (
        x.dtype == weight.dtype in _FLOATS
        and fits(x, weight, experts, bias, activation)
        and 1 in weight.stride()[1:]
        and len(experts) <= min(MAX_PAIRS, MAX_ROWS * len(weight))
    )


def fits(
    x: Tensor, weight: Tensor | QuantizedWeight, experts: Tensor, bias: Tensor | None, activation: str | None
) -> bool:
    """What kernels for experts of any kind of weight [E, N, K] ask of a call."""
    return (
        x.device == weight.device == experts.device
        and len(weight.shape) == 3
        and x.shape[1] == weight.shape[2]
        and (activation is None or activation in ACTIVATIONS and weight.shape[1] % 2 == 0)
        and len(experts) > 0
        and (bias is None or bias.dtype == x.dtype and bias.shape == weight.shape[:2] and bias.stride(1) == 1)
    )


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    max_rows: int | None = None,
    partial: bool = False,
) -> Tensor:
    """See `fused.grouped_linear`; only for what `supports` says. fp32 is computed as fp32."""
    num_pairs, (num_experts, N, K) = len(experts), weight.shape
    N = N // 2 if activation is not None else N
    if x.stride(1) != 1:
        x = x.contiguous()
    narrow = scale is None or scale.dtype == x.dtype
    dtype = x.dtype if narrow else torch.promote_types(x.dtype, scale.dtype)
    out = (torch.zeros if partial else torch.empty)(num_pairs, N, dtype=dtype, device=x.device)
    places = min(num_pairs, num_experts)
    columns, depth = tile(N, K, x.dtype, activation is not None, x.device, times=places)
    block = 16 if num_pairs <= 8 * num_experts or is_amd(x.device) else 32
    grid = (places, triton.cdiv(N, columns), triton.cdiv(max_rows or num_pairs, block))
    launch(_grouped_linear_kernel, grid, x, weight, experts.contiguous(), bias,
           None if scale is None else scale.contiguous(), out, num_pairs, num_pairs // len(x), N, K, x.stride(0),
           *weight.stride(), N * weight.stride(1), 0 if bias is None else bias.stride(0), ACTIVATION=activation,
           EVEN_K=K % depth == 0, EXPERTS=num_experts if partial else None, BY_EXPERT=num_experts <= num_pairs,
           PAIRS=max(16, triton.next_power_of_2(num_pairs)), BLOCK_M=block, BLOCK_N=columns, BLOCK_K=depth, num_warps=4,
           num_stages=stages(x.device))  # fmt: skip
    return out
