"""Several linear layers of one input as one: q/k/v, gate/up."""

from __future__ import annotations

import torch
from torch import nn

from hf_paged_kernels import autograd
from hf_paged_kernels.quantized import QuantizedWeight, cat, same_layout, why_not_joined

from ...quant.linear import QuantLinear
from ...runtime.batch import active_context
from ..checkpoint import trim
from ..swap import Swapped, can_swap
from ..watch import version_of
from ..weights import has_known_weight, local
from .adapted import adapted_linear, changed
from .base import Fusions, is_linear, width_of
from .sharded import is_sharded

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
ALIGNMENT = 64  # bytes
OWN = ("perm", "input_scale")  # tensors of a quantized weight that a layer does not share with its siblings


class Merged:
    """Several linear layers of one input as one weight [N, K]; the layers' parameters are views of it.

    Attributes:
        weight: a tensor or a QuantizedWeight. Vectors along K that belong to a quantized one (the order of its columns,
            the scale of its inputs) remain each layer's own. With autograd on, its gradient is that of the parameters.
        bias: None if the layers have none.
        joined: False while the layers are not of one kind, after something changed some of them. Then they run by
            themselves.
    """

    def __init__(self, layers: list[nn.Linear] | list[QuantLinear], backend: str):
        self.layers = layers
        self.backend = backend
        self.sizes = [width_of(layer) for layer in layers]
        self.rejoin()

    def rejoin(self) -> None:
        """Merge again after something (an assigned parameter, `model.to`) took layers out of the storage."""
        self.joined = _alike(self.layers)
        if not self.joined:
            self.separate()
            return
        self._weight = self._join_quantized() if _quantized(self.layers) else self._join("weight")
        self._bias = None if self.layers[0].bias is None else self._join("bias")

    @property
    def weight(self) -> torch.Tensor | QuantizedWeight | None:
        return self._weight if not torch.is_grad_enabled() or _quantized(self.layers) else self._tracked("weight")

    @weight.setter
    def weight(self, weight: torch.Tensor | QuantizedWeight) -> None:
        self._weight = weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias if self._bias is None or not torch.is_grad_enabled() else self._tracked("bias")

    def _tracked(self, name: str) -> torch.Tensor:
        whole, parts = getattr(self, f"_{name}"), [getattr(layer, name) for layer in self.layers]
        return autograd.joined(whole, parts) if autograd.wanted(*parts) else whole

    def _join(self, name: str) -> torch.Tensor:
        parameters = [local(getattr(layer, name)) for layer in self.layers]
        merged = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, merged.split(self.sizes)):
            parameter.data = part
        return merged

    def _join_quantized(self) -> QuantizedWeight:
        merged = cat([layer.quantized for layer in self.layers])
        for layer, part in zip(self.layers, merged.split(self.sizes)):
            own = layer.quantized.tensors()
            layer.quantized = part.with_tensors({name: own[name] for name in OWN if name in own})
        return merged

    def intact(self) -> bool:
        """Whether every layer's parameters still are the views they were made."""
        if not self.joined:
            return False
        if self._bias is not None and not _follows(self._bias, [local(layer.bias) for layer in self.layers]):
            return False
        if not _quantized(self.layers):
            return _follows(self._weight, [local(layer.weight) for layer in self.layers])
        parts = zip(self.layers, self._weight.split(self.sizes))
        return all(_is_part(layer.quantized, part) for layer, part in parts)

    def separate(self) -> None:
        """Give every parameter its own storage back."""
        self.joined = False
        self._weight = self._bias = None
        for layer in self.layers:
            if isinstance(layer, QuantLinear):
                tensors = layer.quantized.tensors()
                layer.quantized = layer.quantized.with_tensors({name: t.clone() for name, t in tensors.items()})
            elif has_known_weight(layer):
                _own(layer.weight)
            if layer.bias is not None:
                _own(layer.bias)


def _own(parameter: nn.Parameter) -> None:
    """Give a parameter, or this rank's part of it, memory of its own."""
    tensor = local(parameter)
    tensor.data = tensor.data.clone()


def _quantized(layers: list[nn.Module]) -> bool:
    return isinstance(layers[0], QuantLinear)


def _follows(merged: torch.Tensor, parameters) -> bool:
    pointer = merged.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != pointer:
            return False
        pointer += parameter.numel() * parameter.element_size()
    return True


def _is_part(weight: QuantizedWeight, part: QuantizedWeight) -> bool:
    """Whether `weight` still is this part of the joint one."""
    if not same_layout(weight, part):
        return False
    own = weight.tensors()
    return all(
        torch.equal(own[name], tensor) if name in OWN else own[name].data_ptr() == tensor.data_ptr()
        for name, tensor in part.tensors().items()
    )


class MergedLinear(Swapped):
    """State: (Merged, index). The step's context keeps the last merged result for the siblings that follow."""

    def forward(self, input):
        context, (merged, index) = active_context(), self._hf_paged
        if context is None or not merged.joined:
            return changed(context, self, input, super().forward(input))
        kept = context.shared
        same = kept.get("input") is input and kept.get("merged") is merged
        if not same or kept["version"] != version_of(input):  # a hook may have changed the input in place
            kept["input"], kept["merged"], kept["version"] = input, merged, version_of(input)
            joint = adapted_linear(context, merged, input, merged.weight, merged.bias, backend=merged.backend)
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
                if any(map(is_sharded, layers)):  # not parts of a mapped file: at the end they would be there twice
                    trim()


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
            pointer = local(parameter).data_ptr()
            other = owners.setdefault(pointer, id(module))
            if other != id(module):
                tied.add(pointer)
    return tied


def _mergeable(layers: list[nn.Module | None], tied: set[int]) -> bool:
    if not all(is_linear(layer) and can_swap(layer) for layer in layers) or not _alike(layers):
        return False
    for layer in layers:
        if any(local(parameter).data_ptr() in tied for parameter in layer.parameters(recurse=False)):
            return False
        if isinstance(layer, QuantLinear):
            continue
        # a view begins where torch would allocate, or the layer's own forward might give other last bits
        weight = local(layer.weight)
        if weight.numel() * weight.element_size() % ALIGNMENT:
            return False
    return True


def _alike(layers: list[nn.Module]) -> bool:
    """Whether one weight can hold these linear layers."""
    first = layers[0]
    if len({isinstance(layer, QuantLinear) for layer in layers}) > 1 or not all(map(has_known_weight, layers)):
        return False
    if len({None if layer.bias is None else (layer.bias.dtype, layer.bias.device) for layer in layers}) > 1:
        return False
    if _quantized(layers):
        return not why_not_joined([layer.quantized for layer in layers])
    return all(
        layer.in_features == first.in_features
        and layer.weight.dtype == first.weight.dtype
        and layer.weight.device == first.weight.device
        for layer in layers
    )


def _inner_layer(layer):
    """The linear layer that a PEFT adapter is wrapped around; any other layer itself."""
    return getattr(layer, "base_layer", layer)
