"""Dense linear layers in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..norm import Norm
from . import elementwise


def supports_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes these tensors."""
    return x.dtype == weight.dtype and weight.dim() == 2 and x.shape[-1:] == weight.shape[1:]


def linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`norm(x) @ weight.T + bias`, gated, plus `residual`: see `fused.linear`. Leading dimensions of x stay.

    Unlike the compiled kernel, the bits of a row may depend on how many rows come with it.
    """
    if norm is not None:
        x_MK = elementwise.rms_norm(x_MK, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    result = F.linear(x_MK, weight_NK, bias_N)
    if activation is not None:
        result = elementwise.act_and_mul(result, activation)
    if residual is not None:
        result = residual + result
    return result if out_MN is None else out_MN.copy_(result)
