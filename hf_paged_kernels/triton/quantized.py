"""Linear layers on quantized weights: which kernels take which weight. Signatures are those of `ref.quantized`."""

from __future__ import annotations

from torch import Tensor

from ..norm import Norm
from ..quantized import QuantizedWeight
from . import fp8_linear, fp8_moe, int_linear, int_moe


def _kernels(weight: QuantizedWeight):
    """(linear layers, experts) on such weights, modules; None where there are none."""
    if weight.kind != "fp8" and weight.activations is None:
        return int_linear, int_moe
    return (fp8_linear, fp8_moe) if fp8_linear.supports_weight(weight) else (None, None)


def supports_weight(weight: QuantizedWeight) -> bool:
    """Whether there are kernels for such weights at all."""
    return _kernels(weight)[weight.data.dim() == 3] is not None


def rounds_to(weight: QuantizedWeight) -> str | None:
    """See `fused.rounds_to`."""
    return fp8_linear.rounds_to(weight, weight.device)


def supports(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Norm | None, activation: str | None
) -> bool:
    """Whether `linear` takes this call and does all of it well."""
    run = _kernels(weight)[0]
    return run is not None and run.supports(x, weight, bias, norm, activation)


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, **options) -> Tensor:
    """See `fused.linear`; only for what `supports` says."""
    return _kernels(weight)[0].linear(x, weight, bias, **options)


def supports_grouped(
    x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None, activation: str | None
) -> bool:
    """Whether `grouped_linear` takes this call and does it well."""
    run = _kernels(weight)[1]
    return run is not None and run.supports(x, weight, experts, bias, activation)


def grouped_linear(x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    """See `fused.grouped_linear`; only for what `supports_grouped` says."""
    return _kernels(weight)[1].grouped_linear(x, weight, experts, bias, **options)
