"""Random weights of the kinds that linear layers hold quantized, made on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_paged_kernels.quantized import BITS, FIELDS, QuantizedWeight, pack


@dataclass(frozen=True)
class Scheme:
    """How a weight [N, K] is quantized.

    Attributes:
        kind: of `QuantizedWeight`.
        block: (rows, columns) that share a scale; 0 for all there are.
        zeros: whether groups have zero points of their own.
        perm: whether columns lie in another order than the input (act-order).
        activations: the type that inputs are rounded to, or None.
        static: whether all inputs have one scale.
    """

    kind: str
    block: tuple[int, int] = (1, 0)
    zeros: bool = False
    perm: bool = False
    activations: str | None = None
    static: bool = False


def random_weight(
    scheme: Scheme, N: int, K: int, device: torch.device, *, seed: int, experts: int | None = None
) -> QuantizedWeight:
    """A weight whose products with normal inputs have values of about 1; with `experts`, one for each of so many."""
    generator = torch.Generator(device).manual_seed(seed)
    on = dict(device=device, generator=generator)
    many = () if experts is None else (experts,)
    rows, columns = scheme.block[0] or N, scheme.block[1] or K
    blocks = (*many, math.ceil(K / columns), math.ceil(N / rows))
    if scheme.kind == "fp8":
        data = torch.randn(*many, N, K, **on).mul_(64).clamp_(-448, 448).to(torch.float8_e4m3fn)
        size = 64.0
    else:
        low, high = (0, 1 << BITS[scheme.kind]) if scheme.kind in FIELDS else (-128, 128)
        values = torch.randint(low, high, (*many, N, K), dtype=torch.int16, **on)
        data = pack(values, scheme.kind) if scheme.kind in FIELDS else values.to(torch.int8)
        size = (high - low) / 12**0.5
    scales = (torch.rand(blocks, **on) + 0.5) / (size * K**0.5)
    zeros = None
    if scheme.zeros:
        zeros = torch.randint(0, 1 << BITS[scheme.kind], blocks, dtype=torch.int16, **on)
        zeros -= 0 if scheme.kind in FIELDS else 128
    return QuantizedWeight(
        kind=scheme.kind,
        in_features=K,
        data=data,
        scales=scales if scheme.kind == "fp8" else scales.half(),
        zeros=zeros,
        block=(rows, columns),
        perm=torch.randperm(K, **on).to(torch.int32) if scheme.perm else None,
        activations=scheme.activations,
        input_scale=torch.full((1,), 4.0 / 448, device=device) if scheme.static else None,
    )
