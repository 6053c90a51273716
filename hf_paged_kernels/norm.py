"""An RMS norm as an argument of kernels that apply one on the way."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

CASTS = ("weight_after", "weight_before")


class Norm(NamedTuple):
    """With r = rsqrt(mean(x^2) + eps) in fp32, over the last dimension:

        cast="weight_after"   (offset + weight) * (x * r).to(dtype)     Llama, Qwen, Mistral
        cast="weight_before"  ((offset + weight) * (x * r)).to(dtype)   Olmo2; Gemma with offset=1

    Attributes:
        weight: [H] of the input's dtype, or None for none.
        eps: added to the mean square.
        offset: added to the weight.
        cast: where the result is rounded to the input's dtype, one of CASTS.
    """

    weight: Tensor | None
    eps: float
    offset: float = 0.0
    cast: str = "weight_after"
