"""Random quantized weights of every kind, for tests of kernels that multiply by them."""

from __future__ import annotations

import math

import torch

from hf_paged_kernels.quantized import BITS, DTYPES, FIELDS, QuantizedWeight, pack, words_of


def quantized_weight(
    kind: str, *shape: int, group: int = 128, rows: int = 1, zeros=False, perm=False, activations: str | None = None,
    input_scale: float | None = None, device="cpu", dtype=torch.float16,
) -> QuantizedWeight:  # fmt: skip
    """W [N, K] or [E, N, K], about as large as those of a layer of K inputs."""
    *experts, N, K = shape
    generator = torch.Generator().manual_seed(N * K + len(kind) + group)
    bits = BITS[kind]
    low, high = (-128, 128) if kind == "int8" else (0, 1 << bits)
    if kind == "fp8":
        data = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        values = torch.randint(low, high, shape, generator=generator)
        data = values.to(torch.int8) if kind == "int8" else pack(values, kind)
    grid = (*experts, math.ceil(K / group), math.ceil(N / rows))
    step = 2.0 / (1 << bits) / K**0.5
    scales = (torch.rand(grid, generator=generator) + 0.5) * step
    points = torch.randint(low, high + 1, grid, generator=generator).to(torch.int16) if zeros else None
    order = torch.randperm(K, generator=generator).to(torch.int32) if perm else None
    of_inputs = None if input_scale is None else torch.tensor([input_scale])
    tensors = [None if t is None else t.to(device) for t in (data, scales.to(dtype), points, order, of_inputs)]
    return QuantizedWeight(kind, K, *tensors[:3], (rows, group), tensors[3], activations, tensors[4])


def unread_weight(
    kind: str, *shape: int, group: int = 128, rows: int = 1, zeros=False, perm=False, activations: str | None = None,
    static=False,
) -> QuantizedWeight:  # fmt: skip
    """As above, but with nothing in it: for kernels that are only compiled."""
    *experts, N, K = shape
    width, data = (words_of(kind, K), torch.int32) if kind in FIELDS else (K, DTYPES[kind])
    grid = (*experts, math.ceil(K / group), math.ceil(N / rows))
    points = torch.empty(grid, dtype=torch.int16) if zeros else None
    order = torch.empty(K, dtype=torch.int32) if perm else None
    data, scales = torch.empty(*experts, N, width, dtype=data), torch.empty(grid, dtype=torch.float16)
    of_inputs = torch.empty(1) if static else None
    return QuantizedWeight(kind, K, data, scales, points, (rows, group), order, activations, of_inputs)
