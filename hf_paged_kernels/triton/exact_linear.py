"""Linear layers of exact mode on Triton: one tile shape for any number of rows, so that a row has bits of its own.

Every output is one chain of tl.dot over blocks of K in ascending order; rows that do not exist are zeros. Neither the tile's
shape nor the instruction it compiles to depends on how many rows there are (Thinking Machines Lab, "Defeating
Nondeterminism in LLM Inference", 2025). Tiles with the same rows of the weight run side by side, so that these come from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .linear import is_vector, products

_BLOCK_M, _BLOCK_N = 64, 64
_BLOCK_K = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}


@triton.jit(do_not_specialize=("M",))
def _exact_linear_kernel(
    x, weight, bias, out, M, N, K, x_stride, w_stride,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y, _, _ = products(
        x + m * x_stride, m < M, weight + n * w_stride, n < N, 0, None, 0.0, K, 1, False, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], y.to(x.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `exact_linear` takes these tensors."""
    return (
        x.dtype in _BLOCK_K
        and x.dtype == weight.dtype
        and x.device == weight.device
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1] > 0
        and weight.stride(1) == 1
        and (bias is None or is_vector(bias, x, len(weight)))
    )


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias [N], for what `supports` says."""
    (N, K), shape = weight.shape, x.shape
    x = x.reshape(-1, K)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((*shape[:-1], N), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(len(x), _BLOCK_M) * triton.cdiv(N, _BLOCK_N),)
        depth = _BLOCK_K[x.dtype]
        launch(_exact_linear_kernel, grid, x, weight, bias, out, len(x), N, K, x.stride(0), weight.stride(0),
               EVEN_K=K % depth == 0, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=depth, num_warps=4, num_stages=3)  # fmt: skip
    return out
