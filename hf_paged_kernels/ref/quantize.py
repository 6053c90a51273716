"""Rounding rows to 8 bits with a scale of their own, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # the largest magnitude of each type


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (x / scale in `dtype`, float32 scale [...]), the scale being max |x| / the type's largest.

    A row with a NaN or an infinity gets the scale inf, so that it stays one when it is read.
    """
    x = x.float()
    peak = x.abs().amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    scale = peak.clamp(min=1e-30) / LIMITS[dtype]
    y = x / scale[..., None]
    if dtype == torch.int8:
        y = y.nan_to_num(0).round()
    return y.to(dtype), scale
