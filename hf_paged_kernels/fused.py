"""Linear layers and fused elementwise operations of a decoder layer: dispatch to the device's kernels.

`linear` always works (torch's own where there is no kernel); the others need the compiled CPU kernels, and
`why_unavailable` says so before anyone relies on them.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import build
from .cpu import elementwise as _elementwise
from .cpu import linear as _linear

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_unavailable(parameter: Tensor) -> str | None:
    """Why fused kernels cannot run on a model with such parameters, or None if they can."""
    if parameter.device.type != "cpu":
        return f"no fused kernels for {parameter.device.type}"
    if parameter.dtype not in _FLOATS:
        return f"no fused kernels for {parameter.dtype}"
    return build.why_unavailable()


def supports_linear(weight: Tensor) -> bool:
    """Whether `linear` has a kernel for this weight, so that it does better than torch."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and _compiled()


@cache
def _compiled() -> bool:
    return build.available()  # asked several times a layer: remembered here


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N]."""
    if supports_linear(weight) and _linear.supports_linear(x, weight):
        return _linear.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [H, M, K] @ weight [H, K, N] + bias [N] -> [H, M, N]."""
    if supports_linear(weight) and _linear.supports_head_linear(x, weight):
        return _linear.head_linear(x, weight, bias)
    return torch.matmul(x, weight) if bias is None else torch.matmul(x, weight) + bias


def supports_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes a batch of one: q, k [1, H, T, D] and cos, sin [1, T, R] of one dtype on the CPU."""
    return (
        q.device.type == "cpu"
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[0] == cos.shape[0] == 1
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.dtype in _FLOATS
        and q.stride(-1) == k.stride(-1) == 1
    )


rms_norm = _elementwise.rms_norm
act_and_mul = _elementwise.act_and_mul
rotary = _elementwise.rotary
