"""Linear layers on quantized weights in plain torch: the weight is dequantized for every call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm import Norm
from ..quantized import DTYPES, QuantizedWeight
from . import linear as _linear
from . import moe as _moe
from .quantize import LIMITS, quantize


def rounded_rows(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x [..., K] as the product sees it: rounded to 8 bits if `weight.activations` says so. In x's dtype.

    Each row has a scale of its own, max |x| / the type's largest, or all have `input_scale` and what is beyond the
    type's range then is cut off.
    """
    if weight.activations is None:
        return x
    dtype = DTYPES[weight.activations]
    if weight.input_scale is None:
        values, scale = quantize(x, dtype)
        return (values.float() * scale[..., None]).to(x.dtype)
    values = (x.float() / weight.input_scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    values = values.round() if dtype == torch.int8 else values
    return (values.to(dtype).float() * weight.input_scale).to(x.dtype)


def rounds_to(weight: QuantizedWeight) -> str | None:
    """See `fused.rounds_to`."""
    return weight.activations


def supports(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Norm | None, activation: str | None
) -> bool:
    """Everything that fits."""
    return True


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `fused.linear`, with the weight rounded to x's dtype."""
    if norm is not None:
        x = _linear.elementwise.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
    options = dict(activation=activation, residual=residual)
    return _linear.linear(rounded_rows(x, weight), weight.dequantize(x.dtype), bias, **options)


def supports_grouped(
    x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None, activation: str | None
) -> bool:
    """Everything that fits."""
    return True


def grouped_linear(x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    """See `fused.grouped_linear`, with the weights rounded to x's dtype, one expert's after the other."""
    return _moe.grouped_linear(rounded_rows(x, weight), _OneByOne(weight, x.dtype), experts, bias, **options)


class _OneByOne:
    """The weights [E, N, K] of experts, each dequantized when it is asked for."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        self.shape, self._weight, self._dtype = weight.shape, weight, dtype

    def __getitem__(self, expert: int) -> Tensor:
        return self._weight.expert(expert).dequantize(self._dtype)
