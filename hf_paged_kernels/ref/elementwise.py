"""RMS norms, gated activations and rotary embedding in plain torch: the formulas of transformers' eager modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "weight_after") -> Tensor:
    """x [..., H]; with r = rsqrt(mean(x^2) + eps) in fp32:

        cast="weight_after"   (offset + weight) * (x * r).to(dtype)
        cast="weight_before"  ((offset + weight) * (x * r)).to(dtype)
    """
    if cast not in ("weight_after", "weight_before"):
        raise ValueError(f"unknown cast {cast!r}; known: weight_before, weight_after")
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast == "weight_after":
        return (offset + weight if offset else weight) * normed.to(x.dtype)
    return (normed * (offset + weight.float())).to(x.dtype)


def act_and_mul(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up [..., 2 I] -> activation(gate_up[..., :I]) * gate_up[..., I:]."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(_ACTIVATIONS)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


def rotary(q_THD: Tensor, k_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` on the first R of D dimensions of every head."""
    return _rotate(q_THD, cos_TR, sin_TR), _rotate(k_THD, cos_TR, sin_TR)


def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    R = cos_TR.shape[-1]
    x, rest = x_THD[..., :R], x_THD[..., R:]
    rotated_half = torch.cat((-x[..., R // 2 :], x[..., : R // 2]), dim=-1)
    return torch.cat((x * cos_TR[:, None] + rotated_half * sin_TR[:, None], rest), dim=-1)
