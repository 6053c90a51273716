"""Linear layers on weights that are whole numbers with scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm import Norm
from ..quantized import QuantizedWeight
from .dequantize import dequantize

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Norm | None, activation: str | None
) -> bool:
    """Whether `linear` takes this call and does all of it well."""
    if not (x.dtype in _FLOATS and x.device == weight.device and weight.data.dim() == 2):
        return False
    return norm is None and activation is None


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
    if weight.perm is not None:
        x = x.index_select(-1, weight.perm)
    y = F.linear(x, dequantize(weight, x.dtype), bias)
    return y if residual is None else y.add_(residual)
