"""Linear layers of which adapters of single rows may make something else; see `runtime.adapters`."""

from __future__ import annotations

from torch import Tensor

from hf_paged_kernels import fused
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.quantized import QuantizedWeight

from ...runtime.batch import active_context
from ..swap import Swapped


class AdaptedLayer(Swapped):
    """A layer that runs its own code, and that some adapter changes. State: None."""

    def forward(self, input, *args, **kwargs):
        return changed(active_context(), self, input, super().forward(input, *args, **kwargs))


def changed(context, layer: object, x: Tensor, y: Tensor) -> Tensor:
    """What the rows' adapters make of y, the output of `layer` (see `StepAdapters.changed`)."""
    return y if context is None or context.adapters is None else context.adapters.changed(layer, x, y)


def adapted_linear(
    context,
    layer: object,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str,
) -> Tensor:
    """`fused.linear`, with what the adapters of the step's rows make of the product.

    Args:
        layer: as adapters know it: a module, or the Merged of several.
    """
    options = dict(norm=norm, activation=activation, residual=residual, backend=backend)
    if context is None or context.adapters is None:
        return fused.linear(x, weight, bias, **options)
    if norm is not None:
        x = fused.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, backend=backend)
    y = context.adapters.changed(layer, x, fused.linear(x, weight, bias, backend=backend))
    if activation is not None:
        y = fused.act_and_mul(y, activation, backend=backend)
    return y if residual is None else residual + y
