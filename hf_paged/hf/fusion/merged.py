"""Several linear layers of one input as one: q/k/v, gate/up."""

from __future__ import annotations

import torch
from torch import nn

from hf_paged_kernels import fused

from ...runtime.batch import active_context
from ..swap import Swapped, can_swap
from ..watch import version_of
from .base import Fusions

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
ALIGNMENT = 64  # bytes


class Merged:
    """Several linear layers of one input as one weight [N, K]; the layers' parameters are views of it."""

    def __init__(self, layers: list[nn.Linear], backend: str):
        self.layers = layers
        self.backend = backend
        self.sizes = [layer.out_features for layer in layers]
        self.weight = self._join([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else self._join([layer.bias for layer in layers])

    def _join(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        merged = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, merged.split([p.shape[0] for p in parameters])):
            parameter.data = part
        return merged

    def intact(self) -> bool:
        """Whether every layer's parameters still are the views they were made."""
        return _follows(self.weight, [layer.weight for layer in self.layers]) and (
            self.bias is None or _follows(self.bias, [layer.bias for layer in self.layers])
        )

    def rejoin(self) -> None:
        """Merge again after something (an assigned parameter, `model.to`) took layers out of the storage."""
        self.weight = self._join([layer.weight for layer in self.layers])
        if self.bias is not None:
            self.bias = self._join([layer.bias for layer in self.layers])

    def separate(self) -> None:
        """Give every parameter its own storage back."""
        for layer in self.layers:
            layer.weight.data = layer.weight.data.clone()
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.clone()


def _follows(merged: torch.Tensor, parameters) -> bool:
    pointer = merged.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != pointer:
            return False
        pointer += parameter.numel() * parameter.element_size()
    return True


class MergedLinear(Swapped):
    """State: (Merged, index). The step's context keeps the last merged result for the siblings that follow."""

    def forward(self, input):
        context = active_context()
        if context is None:
            return super().forward(input)
        merged, index = self._hf_paged
        kept = context.shared
        same = kept.get("input") is input and kept.get("merged") is merged
        if not same or kept["version"] != version_of(input):  # a hook may have changed the input in place
            kept["input"], kept["merged"], kept["version"] = input, merged, version_of(input)
            joint = fused.linear(input, merged.weight, merged.bias, backend=merged.backend)
            kept["parts"] = torch.split_with_sizes(joint, merged.sizes, dim=-1)
        return kept["parts"][index]


def merge_projections(model: nn.Module, fusions: Fusions) -> None:
    """Merge the sibling projections of every module of `model` that has some, each with its own name in `counts`."""
    tied = _tied_parameters(model)
    for module in list(model.modules()):
        for kind, names in (("qkv", QKV), ("gate_up", GATE_UP)):
            layers = [_inner_layer(getattr(module, name, None)) for name in names]
            if _mergeable(layers, tied):
                merged = Merged(layers, fusions.backend)
                fusions.merged.append(merged)
                for index, layer in enumerate(layers):
                    fusions.swap(layer, MergedLinear, (merged, index), kind)


def merged_of(module: nn.Module, names: tuple[str, ...]) -> Merged | None:
    """The Merged of which the children `names` of `module` are all there is."""
    states = [getattr(module._modules.get(name), "_hf_paged", None) for name in names]
    if not all(isinstance(state, tuple) and isinstance(state[0], Merged) for state in states):
        return None
    merged = states[0][0]
    return merged if merged.layers == [module._modules[name] for name in names] else None


def _tied_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that share storage with another one; those stay where they are."""
    owners: dict[int, int] = {}
    tied = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            other = owners.setdefault(parameter.data_ptr(), id(module))
            if other != id(module):
                tied.add(parameter.data_ptr())
    return tied


def _mergeable(layers: list[nn.Module | None], tied: set[int]) -> bool:
    if not all(type(layer) is nn.Linear and can_swap(layer) for layer in layers):
        return False
    first = layers[0]
    for layer in layers:
        same = (
            layer.in_features == first.in_features
            and layer.weight.dtype == first.weight.dtype
            and layer.weight.device == first.weight.device
            and (layer.bias is None) == (first.bias is None)
        )
        # a view begins where torch would allocate, or the layer's own forward might give other last bits
        aligned = layer.weight.numel() * layer.weight.element_size() % ALIGNMENT == 0
        if not same or not aligned or layer.weight.data_ptr() in tied or type(layer.weight) is not nn.Parameter:
            return False
    return True


def _inner_layer(layer):
    """The linear layer that a PEFT adapter is wrapped around; any other layer itself."""
    return getattr(layer, "base_layer", layer)
