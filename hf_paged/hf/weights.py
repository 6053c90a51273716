"""Parameters of models some of whose weights are quantized, by us or by others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_paged_kernels.quantized import QuantizedWeight

from ..quant.linear import QuantLinear


def local(tensor):
    """This rank's part of a tensor that is spread over several; any other tensor, or None, itself.

    It is the very tensor that the distributed one consists of (what `to_local` gives is a view): what is written into it,
    or set as its `data`, is so there.
    """
    if tensor is None or type(tensor) is nn.Parameter:
        return tensor
    return getattr(tensor, "_local_tensor", tensor)


def is_spread(model: nn.Module) -> bool:
    """Whether parts of a model are on several ranks."""
    return any(local(parameter) is not parameter for parameter in model.parameters())


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def float_parameter(model: nn.Module) -> nn.Parameter:
    """The first parameter of the type that hidden states have: not a quantized weight, nor what belongs to one.

    A module with a parameter of another type is quantized, by whomever: its floats are scales. Models without any have
    their first parameter.
    """
    for module in model.modules():
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        if parameters and all(parameter.dtype in FLOATS for parameter in parameters):
            return parameters[0]
    return next(model.parameters())


def has_known_weight(layer: nn.Module) -> bool:
    """Whether the weight of a linear layer is what it seems. Other packages put packed bytes, 8-bit floats or tensors of
    a type of their own (bitsandbytes, transformers' FP8Linear, torchao) into linear layers, with products of their own."""
    if isinstance(layer, QuantLinear):
        return layer.is_packed
    weight = layer._parameters.get("weight")
    part = local(weight)
    plain = type(weight) is nn.Parameter if part is weight else type(part) is torch.Tensor
    return plain and weight.is_floating_point() and weight.element_size() > 1


def weight_of(layer: nn.Module) -> Tensor | QuantizedWeight:
    """The weight of a linear layer, as the kernels take it."""
    return layer.quantized if isinstance(layer, QuantLinear) else local(layer.weight)
