"""Linear layers by our kernels, on the live weight."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_paged_kernels import fused
from hf_paged_kernels.exactness import exact

from ...quant.linear import QuantLinear
from ...runtime.batch import active_context
from ..swap import Swapped, can_swap
from ..weights import has_known_weight, local, weight_of
from .adapted import adapted_linear, changed
from .base import LINEAR, Fusions, is_plain
from .proof import agree, in_fp32, random_rows
from .sharded import is_sharded


class FusedLinear(Swapped):
    """y = x W^T + b, W quantized or not. State: the backend."""

    def forward(self, input):
        context = active_context()
        if context is None or not has_known_weight(self):
            return changed(context, self, input, super().forward(input))
        return adapted_linear(context, self, input, weight_of(self), self.bias, backend=self._hf_paged)


class FusedConv1D(Swapped):
    """GPT-2's linear layer, whose weight is kept [K, N]. State: the backend."""

    def forward(self, x):
        context = active_context()
        if context is None or x.dim() != 3:
            return changed(context, self, x, super().forward(x))
        return changed(context, self, x, fused.head_linear(x, self.weight[None], self.bias))


def project(layer: nn.Module, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
    """residual + layer(x), in one call where `layer` is a plain linear layer."""
    if is_plain(layer):
        weight = weight_of(layer)
        return adapted_linear(active_context(), layer, x, weight, layer.bias, residual=residual, backend=backend)
    y = layer(x)
    return y if residual is None else residual + y


def rows_for(layer: nn.Module, fusions: Fusions) -> Tensor:
    """Random rows that a linear layer takes."""
    return random_rows(layer.in_features, fusions.like if isinstance(layer, QuantLinear) else local(layer.weight))


def fuse_linear(module: nn.Module, fusions: Fusions) -> None:
    if not (isinstance(module, (*LINEAR, Conv1D)) and can_swap(module) and has_known_weight(module)) or is_sharded(module):
        return
    with exact(fusions.exact):
        if not fused.supports_linear(weight_of(module), backend=fusions.backend):
            return
    if type(module) is Conv1D:
        if fusions.backend == "cpu":
            fusions.swap(module, FusedConv1D, None, "linear")
    elif type(module) in LINEAR or isinstance(module, nn.Linear) and _only_linear(module, fusions.backend):
        fusions.swap(module, FusedLinear, fusions.backend, "linear")


def _only_linear(module: nn.Linear, backend: str) -> bool:
    """Whether a modeling file's subclass, such as Falcon's, computes just what nn.Linear does."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    x = random_rows(module.in_features, module.weight)
    expected, actual = module(x), fused.linear(x, module.weight, module.bias, backend=backend)
    return isinstance(expected, Tensor) and agree(
        actual, expected, tolerance=1e-5, backend=backend, truth=in_fp32(module, x)
    )


def linear_layers(model: nn.Module) -> set[int]:
    """The ids of the plain linear layers that a model has."""
    return {id(module) for module in model.modules() if isinstance(module, nn.Linear)}


def newcomers(modules: list[nn.Module], known: set[int]) -> list[nn.Module]:
    """Plain linear layers among `modules` that were not `known`, and so run on torch's kernel."""
    return [module for module in modules if type(module) is nn.Linear and id(module) not in known]
