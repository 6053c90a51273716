"""Linear layers of few rows: one kernel that streams the weight once, with the norm before it and what follows inside.

The weight's tile is the wide side of the product, the rows of x are padded to the 16 that a matrix instruction takes.
As few programs as there are SMs must keep the memory busy, so several tiles of the weight are always on their way to
shared memory. Sums run along K in one order, whatever the number of rows, and without atomics.

The norm's scale is a factor of a whole row, so it is applied to the sums, not to x:

    y = r * sum_k (x * (offset + w))_k W_k      r = rsqrt(mean(x^2) + eps), summed along the way

which needs no pass over x beforehand and rounds x once where the separate kernels round it twice, whichever the cast.
In fp16 the product without r may overflow: there the norm is a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import CASTS, Norm
from .functions import ACTIVATIONS, activate, rounded
from .launch import arch, is_amd, launch, num_sms, tuned

MAX_ROWS = 32  # beyond, cuBLAS: every tile of the weight meets every row of x, which by then comes to half its own size
_COLUMNS = (64, 32, 16)  # of a tile: the most that leave a program for (nearly) every SM
_BUSY = 0.9  # share of the SMs that is nearly all
_TILE_BYTES = 16384  # of the weight in one stage; rows of at least 256 bytes, whole bursts of memory
_AMD_TILE_BYTES = 8192  # there a tile on its way waits in registers


@triton.jit
def products(
    x_rows, x_inside, w_rows, w_inside, up, norm_weight, offset, K, w_k,
    GATED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ w.T of BLOCK_M rows of x and BLOCK_N rows of w, in fp32.

    Args:
        x_rows, w_rows: pointers to the rows' beginnings, [BLOCK_M] and [BLOCK_N].
        x_inside, w_inside: which of them exist.
        up: for GATED, from a row of w to its partner in the second half.
        norm_weight: None, or what x is multiplied by (with `offset` added), in x's dtype.
        w_k: from an element of a row of w to the next; those of x lie side by side.

    Returns:
        (products, products with the second half, sums of squares of x [BLOCK_M]); the last two 0 unless asked for.
    """
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    x_at = x_rows[:, None] + k[None, :]
    w_at = w_rows[None, :] + k[:, None] * w_k
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    result_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        if norm_weight is not None:  # first, so that it is on its way while the loop waits for its tiles
            by = offset + tl.load(norm_weight + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        x_mask = x_inside[:, None]
        w_mask = w_inside[None, :]
        if not EVEN_K:
            x_mask = x_mask & (start + k < K)[None, :]
            w_mask = w_mask & (start + k < K)[:, None]
        x = tl.load(x_at, mask=x_mask, other=0.0)
        w = tl.load(w_at, mask=w_mask, other=0.0, eviction_policy="evict_first")
        if norm_weight is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            x = (wide * by[None, :]).to(DTYPE)
        result = tl.dot(x, w, result, input_precision="ieee")
        if GATED:
            w_up = tl.load(w_at + up, mask=w_mask, other=0.0, eviction_policy="evict_first")
            result_up = tl.dot(x, w_up, result_up, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K * w_k
    return result, result_up, squares


@triton.jit(do_not_specialize=("M",))
def _linear_kernel(
    x, weight, bias, norm_weight, residual, out, M, N, K, x_stride, w_stride, up, residual_stride, eps, offset,
    inverse_k, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    GATED: tl.constexpr = ACTIVATION is not None
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y, y_up, squares = products(
        x + m * x_stride, m < M, weight + n * w_stride, n < N, up, norm_weight, offset, K, 1,
        GATED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if norm_weight is not None:
        scale = tl.rsqrt(squares * inverse_k + eps)[:, None]
        y *= scale
        y_up *= scale
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias is not None:
            y_up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y = rounded(activate(rounded(y, DTYPE), ACTIVATION), DTYPE) * rounded(y_up, DTYPE)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if residual is not None:
        before = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside)
        y = rounded(y, DTYPE) + before.to(tl.float32)
    tl.store(out + m[:, None] * N + n[None, :], y.to(DTYPE), mask=inside)


def is_few_rows(x: Tensor) -> bool:
    """Whether x [..., K] is of the rows and types that the kernel is for."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.numel() <= MAX_ROWS * x.shape[-1]


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, activation: str | None) -> bool:
    """Whether `linear` takes this call and is meant for it: few rows, of a type that matrix instructions take."""
    if not (
        is_few_rows(x)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and weight.stride(1) == 1
    ):
        return False
    if activation is not None and (activation not in ACTIVATIONS or len(weight) % 2):
        return False
    if norm is not None and (x.dtype != torch.bfloat16 or norm.cast not in CASTS):
        return False
    if norm is not None and not is_vector(norm.weight, x, x.shape[-1]):
        return False
    return bias is None or is_vector(bias, x, len(weight))


def is_vector(vector: Tensor | None, x: Tensor, size: int) -> bool:
    """Whether a bias or a norm's weight is one of `size` values of x's type, side by side."""
    return vector is not None and vector.shape == (size,) and vector.dtype == x.dtype and vector.is_contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
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
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.reshape(-1, N)
    out = torch.empty((*shape[:-1], N), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    columns, depth = tile(N, K, x.dtype, activation is not None, x.device)
    columns, depth, num_warps, num_stages = tuned(
        "linear", columns=columns, depth=depth, num_warps=4, num_stages=stages(x.device)
    )
    launch(_linear_kernel, (triton.cdiv(N, columns),), x, weight, bias, None if norm is None else norm.weight, residual,
           out, len(x), N, K, x.stride(0), weight.stride(0), N * weight.stride(0),
           0 if residual is None else residual.stride(0), 0.0 if norm is None else norm.eps,
           0.0 if norm is None else norm.offset, 1.0 / K, ACTIVATION=activation, EVEN_K=K % depth == 0,
           BLOCK_M=16 if len(x) <= 16 else 32, BLOCK_N=columns, BLOCK_K=depth,
           num_warps=num_warps, num_stages=num_stages)  # fmt: skip
    return out


def tile(N: int, K: int, dtype: torch.dtype, gated: bool, device: torch.device, *, times: int = 1) -> tuple[int, int]:
    """(columns, depth) of the weight's tile: as many columns as leave nearly every SM a program, and a stage's bytes.

    `times`: how many such weights the launch reads.
    """
    halves = 2 if gated else 1
    choices = [columns for columns in _COLUMNS if columns * halves <= _COLUMNS[0]]
    busy = _BUSY * num_sms(device)
    columns = next((columns for columns in choices if times * triton.cdiv(N, columns) >= busy), choices[-1])
    depth = (_AMD_TILE_BYTES if is_amd(device) else _TILE_BYTES) // (dtype.itemsize * halves * columns)
    return columns, max(32, min(depth, triton.next_power_of_2(K)))


def stages(device: torch.device) -> int:
    """Tiles in flight and in use: with x 100 KiB a program, two programs on an H100's SM; AMD has one in registers."""
    name = arch(device)
    return 2 if is_amd(device) else 4 if name.startswith("sm_8") else 5
