"""Norms, gated activations and rotary embedding in plain torch: the formulas of transformers' eager modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm import Norm
from ..quantized import DTYPES
from .quantize import quantize as _quantize

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = "weight_after",
    quantize: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., H]; with r = rsqrt(mean(x^2) + eps) in fp32:

        cast="weight_after"   (offset + weight) * (x * r).to(dtype)
        cast="weight_before"  ((offset + weight) * (x * r)).to(dtype)
    """
    if cast not in ("weight_after", "weight_before"):
        raise ValueError(f"unknown cast {cast!r}; known: weight_before, weight_after")
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        result = normed.to(x.dtype)
    elif cast == "weight_after":
        result = (offset + weight if offset else weight) * normed.to(x.dtype)
    else:
        result = (normed * (offset + weight.float())).to(x.dtype)
    return quantized(result, quantize)


def add_rms_norm(x: Tensor, residual: Tensor, norm: Norm, *, quantize: str | None = None):
    """(rms_norm(x + residual), x + residual), the sum rounded to the dtype before it is normed."""
    total = residual + x
    return rms_norm(total, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, quantize=quantize), total


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, quantize: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last dimension of x [..., H]."""
    return quantized(F.layer_norm(x, x.shape[-1:], weight, bias, eps), quantize)


def act_and_mul(gate_up: Tensor, activation: str, *, quantize: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """gate_up [..., 2 I] -> activation(gate_up[..., :I]) * gate_up[..., I:]."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(_ACTIVATIONS)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return quantized(_ACTIVATIONS[activation](gate) * up, quantize)


def quantized(x: Tensor, quantize: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """x itself for None; for "fp8" or "int8" (e4m3 or int8 [..., H], scale [..., 1] fp32) with x = values * scale.

    A row's scale takes its largest magnitude to the type's: `ref.quantize`.
    """
    if quantize is None:
        return x
    if quantize not in DTYPES:
        raise ValueError(f"unknown quantize {quantize!r}; known: {', '.join(DTYPES)}")
    values, scale = _quantize(x, DTYPES[quantize])
    return values, scale[..., None]


def rotary(q_THD: Tensor, k_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` on the first R of D dimensions of every head."""
    return _rotate(q_THD, cos_TR, sin_TR), _rotate(k_THD, cos_TR, sin_TR)


def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    R = cos_TR.shape[-1]
    x, rest = x_THD[..., :R], x_THD[..., R:]
    rotated_half = torch.cat((-x[..., R // 2 :], x[..., : R // 2]), dim=-1)
    return torch.cat((x * cos_TR[:, None] + rotated_half * sin_TR[:, None], rest), dim=-1)
