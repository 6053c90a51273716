"""Dense linear layers on the live weight, in its own layout: see linear.cpp, linear_bf16.cpp and head_linear.cpp."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from . import build


def supports_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes these tensors: fp32 or bf16 on the CPU, rows of the weight contiguous, shapes that fit."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type == weight.device.type == "cpu"
        and weight.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1] > 0
        and weight.stride(1) == 1
    )


def linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` in fp32, rounded to the type of x, without autograd.

    A row of the result depends, bit for bit, on that row of x and the weight alone: not on the number of rows, its
    place among them, or the number of threads.

    Args:
        x_MK: [M, K] whose row stride may exceed K; [..., K] is flattened.
        weight_NK: [N, K] as nn.Linear keeps it; rows contiguous, row stride free (a view into a merged weight).
        bias_N: [N] contiguous, or None.
        out_MN: written and returned if given: [M, N] (or the shape of the result), rows contiguous.

    Returns:
        [M, N], or [..., N].
    """
    if not supports_linear(x_MK, weight_NK):
        raise ValueError(
            f"linear takes float32 or bfloat16 x [..., K] and weight [N, K] with contiguous rows, on the CPU; got x "
            f"{_describe(x_MK)} and weight {_describe(weight_NK)}"
        )
    N, K = weight_NK.shape
    shape = x_MK.shape
    if len(shape) != 2:
        x_MK = x_MK.reshape(-1, K)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    M = x_MK.shape[0]
    if out_MN is None:
        result = out_MN = torch.empty((*shape[:-1], N), dtype=x_MK.dtype)
        out_stride = N
    else:
        result, out_MN = out_MN, out_MN.view(M, N) if out_MN.dim() != 2 else out_MN
        if out_MN.shape != (M, N) or out_MN.dtype != x_MK.dtype or (out_MN.stride(1) != 1 and N > 1):
            raise ValueError(f"out must be {x_MK.dtype} [{M}, {N}] with contiguous rows; got {_describe(out_MN)}")
        out_stride = out_MN.stride(0)
    bias = None
    if bias_N is not None:
        if bias_N.dtype != x_MK.dtype or bias_N.shape != (N,) or (bias_N.stride(0) != 1 and N > 1):
            raise ValueError(f"bias must be contiguous {x_MK.dtype} [{N}]; got {_describe(bias_N)}")
        bias = bias_N.data_ptr()
    if not (M and N):
        return result
    if x_MK.dtype == torch.bfloat16:
        _kernel("hfp_linear_bf16")(
            x_MK.data_ptr(), x_MK.stride(0), weight_NK.data_ptr(), weight_NK.stride(0), bias, result.data_ptr(),
            out_stride, M, N, K,
        )  # fmt: skip
    else:
        _kernel("hfp_linear_f32")(
            x_MK.data_ptr(), 0, x_MK.stride(0), weight_NK.data_ptr(), 0, weight_NK.stride(0), bias, result.data_ptr(),
            0, out_stride, 1, M, N, K,
        )  # fmt: skip
    return result


def head_linear(x_HMK: torch.Tensor, weight_HKN: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """`x[h] @ weight[h] + bias` in fp32, without autograd. A row's bits are its own, as in `linear`.

    Args:
        x_HMK: [H, M, K] with contiguous rows, other strides free.
        weight_HKN: [H, K, N], contiguous along N (head_linear.cpp) or along K (linear.cpp), other strides free.
        bias_N: [N] contiguous, or None.

    Returns:
        [H, M, N], laid out as [M, H, N].
    """
    if not supports_head_linear(x_HMK, weight_HKN):
        raise ValueError(
            f"head_linear takes float32 x [H, M, K] with contiguous rows and weight [H, K, N] with contiguous rows or "
            f"columns, on the CPU; got x {_describe(x_HMK)} and weight {_describe(weight_HKN)}"
        )
    (H, M, K), N = x_HMK.shape, weight_HKN.shape[2]
    if bias_N is not None and (bias_N.dtype != torch.float32 or bias_N.shape != (N,) or not bias_N.is_contiguous()):
        raise ValueError(f"bias must be contiguous float32 [{N}]; got {_describe(bias_N)}")
    out = torch.empty(M, H, N, dtype=torch.float32)
    by_head, along_k, along_n = weight_HKN.stride()
    name, weight_row = ("hfp_head_linear_f32", along_k) if along_n == 1 else ("hfp_linear_f32", along_n)
    if out.numel():
        _kernel(name)(
            x_HMK.data_ptr(), *x_HMK.stride()[:2], weight_HKN.data_ptr(), by_head, weight_row,
            None if bias_N is None else bias_N.data_ptr(), out.data_ptr(), N, H * N, H, M, N, K,
        )  # fmt: skip
    return out.transpose(0, 1)


def supports_head_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `head_linear` takes these tensors."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() == weight.dim() == 3
        and len(x) == len(weight)
        and x.shape[2] == weight.shape[1] > 0
        and x.stride(2) == 1
        and 1 in weight.stride()[1:]
    )


@cache
def _kernel(name: str):
    function = getattr(build.load(), name)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    heads = [] if name == "hfp_linear_bf16" else [size]
    function.argtypes = [pointer, *heads, size, pointer, *heads, size, pointer, pointer, *heads * 2, *[size] * 4]
    function.restype = None
    return function


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())} on {tensor.device}"
