"""Parameters of models some of whose weights are quantized."""

from __future__ import annotations

import torch

from ..quant.linear import QuantLinear

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def float_parameter(model: torch.nn.Module) -> torch.nn.Parameter:
    """The first parameter of the type that hidden states have: not a quantized weight, nor what belongs to one.

    Models without any have their first parameter.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in FLOATS:
                return parameter
    return next(model.parameters())
