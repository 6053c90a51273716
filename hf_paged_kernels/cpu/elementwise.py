"""RMS norms, gated activations and rotary embedding on the CPU: see elementwise.cpp.

All take fp32, bf16 or fp16 and round where the eager modules of transformers round. No autograd.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from . import build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_CASTS = {"weight_before": 0, "weight_after": 1}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "weight_after") -> Tensor:
    """RMS norm over the last dimension; with r = rsqrt(mean(x^2) + eps) in fp32:

        cast="weight_after"   (offset + weight) * (x * r).to(dtype)     Llama, Qwen, Mistral
        cast="weight_before"  ((offset + weight) * (x * r)).to(dtype)   Olmo2; Gemma with offset=1

    Args:
        x: [..., H], the last dimension contiguous; [T, heads, H] may be a view into a merged projection.
        weight: [H] of x's dtype, or None for none.

    Returns:
        A new contiguous tensor of x's shape.
    """
    H = x.shape[-1]
    _check_norm(x, weight, H)
    if x.dim() == 2:
        x_ABH, stride_a, A, B = x, 0, 1, x.shape[0]
        stride_b = x.stride(0)
    else:
        x_ABH = x if x.dim() == 3 else x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, H)
        A, B, _ = x_ABH.shape
        stride_a, stride_b, _ = x_ABH.stride()
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        _library().hf_paged_rms_norm(
            _DTYPES[x.dtype], x_ABH.data_ptr(), stride_a, stride_b, A, B, H, _pointer(weight), eps, offset,
            _choice("cast", cast, _CASTS), out.data_ptr(),
        )  # fmt: skip
    return out


def act_and_mul(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [..., 2 I] -> activation(gate_up[..., :I]) * gate_up[..., I:], contiguous.

    Activations: "silu", "gelu" (erf), "gelu_tanh".
    """
    kind = _choice("activation", activation, _ACTIVATIONS)
    _check("gate_up", gate_up)
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"gate_up needs an even last dimension, got {_describe(gate_up)}")
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, width)
    out = torch.empty((*gate_up.shape[:-1], width // 2), dtype=gate_up.dtype)
    if out.numel():
        _library().hf_paged_act_and_mul(
            _DTYPES[gate_up.dtype], kind, rows.data_ptr(), rows.stride(0), rows.shape[0], width // 2, out.data_ptr()
        )
    return out


def rotary(q_THD: Tensor, k_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` on the first R of D dimensions of every head; the rest passes through.

    Args:
        q_THD, k_THD: [T, Hq, D] and [T, Hkv, D], views with any strides over tokens and heads.
        cos_TR, sin_TR: [T, R], R even, as transformers makes them: both halves of R hold the frequencies.

    Returns:
        New contiguous q and k.
    """
    T, q_heads, D = q_THD.shape
    k_heads, R = k_THD.shape[1], cos_TR.shape[-1]
    for name, tensor in (("q", q_THD), ("k", k_THD), ("cos", cos_TR), ("sin", sin_TR)):
        _check(name, tensor)
        if tensor.dtype != q_THD.dtype:
            raise ValueError(f"rotary needs one dtype, got q {q_THD.dtype} and {name} {tensor.dtype}")
    if k_THD.shape != (T, k_heads, D) or cos_TR.shape != (T, R) or sin_TR.shape != (T, R) or R % 2 or R > D:
        raise ValueError(
            "rotary takes q [T, Hq, D], k [T, Hkv, D], cos and sin [T, R] with R even and at most D; got "
            f"{list(q_THD.shape)}, {list(k_THD.shape)}, {list(cos_TR.shape)}, {list(sin_TR.shape)}"
        )
    dtype = q_THD.dtype
    q_out, k_out = torch.empty((T, q_heads, D), dtype=dtype), torch.empty((T, k_heads, D), dtype=dtype)
    if T:
        _library().hf_paged_rotary(
            _DTYPES[dtype], q_THD.data_ptr(), q_THD.stride(0), q_THD.stride(1), q_heads, q_out.data_ptr(),
            k_THD.data_ptr(), k_THD.stride(0), k_THD.stride(1), k_heads, k_out.data_ptr(),
            cos_TR.data_ptr(), cos_TR.stride(0), sin_TR.data_ptr(), sin_TR.stride(0), T, D, R,
        )  # fmt: skip
    return q_out, k_out


@cache
def _library() -> ctypes.CDLL:
    library = build.load()
    i, p, f = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    library.hf_paged_rms_norm.argtypes = [i, p, i, i, i, i, i, p, f, f, i, p]
    library.hf_paged_act_and_mul.argtypes = [i, i, p, i, i, i, p]
    library.hf_paged_rotary.argtypes = [i, p, i, i, i, p, p, i, i, i, p, p, i, p, i, i, i, i]
    for name in ("rms_norm", "act_and_mul", "rotary"):
        getattr(library, f"hf_paged_{name}").restype = None
    return library


def _check_norm(x: Tensor, weight: Tensor | None, H: int) -> None:
    _check("x", x)
    if weight is None:
        return
    if weight.dtype != x.dtype or weight.shape != (H,) or weight.device.type != "cpu" or not weight.is_contiguous():
        raise ValueError(f"weight must be a contiguous {x.dtype} [{H}] on the CPU, got {_describe(weight)}")


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES or tensor.device.type != "cpu" or tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 on the CPU with a contiguous last dimension, got "
            f"{_describe(tensor)}"
        )


def _choice(name: str, value: str, known: dict[str, int]) -> int:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    return known[value]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())} on {tensor.device}"
