"""Linear layers of mixture-of-experts layers in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import elementwise


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    max_rows: int | None = None,
    partial: bool = False,
) -> Tensor:
    """See `fused.grouped_linear`: expert by expert, those that are asked for."""
    x = x.repeat_interleave(len(experts) // len(x), dim=0)
    result = x.new_zeros(len(experts), weight.shape[1])
    for expert in experts.unique().tolist():
        if partial and expert == len(weight):
            continue
        rows = experts == expert
        result[rows] = F.linear(x[rows], weight[expert], None if bias is None else bias[expert])
    if activation is not None:
        result = elementwise.act_and_mul(result, activation)
    return result if scale is None else result * scale[:, None]
