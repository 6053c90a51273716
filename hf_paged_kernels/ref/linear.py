"""Dense linear layers in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def supports_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes these tensors."""
    return x.dtype == weight.dtype and weight.dim() == 2 and x.shape[-1:] == weight.shape[1:]


def linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`; any leading dimensions of x stay as they are.

    Unlike the compiled kernel, the bits of a row may depend on how many rows come with it.
    """
    result = F.linear(x_MK, weight_NK, bias_N)
    return result if out_MN is None else out_MN.copy_(result)
