"""Weights of 8 bits that lie in a checkpoint as they are, int8 or fp8 (e4m3), with scales for all, for channels, for
groups of input features, or for blocks.

    W[n, k] = scale[n // rows, k // columns] * (weight[n, k] - zero[n // rows, k // columns])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import DTYPES, QuantizedWeight

from ...base.errors import InvalidArgument, UnsupportedOption
from .base import FLOATS, Format, Stored, require_finite

POWER_OF_TWO = torch.float8_e8m0fnu


@dataclass(frozen=True)
class EightBit(Format):
    """Layers with 8-bit weights.

    Attributes:
        kind: "fp8" or "int8".
        block: (rows, columns) that share a scale; None stands for all rows or all columns.
        scale: the scales' name.
        scale_dims: their number of dimensions: one scale may be stored as [], [1] or [1, 1], one for each channel as [N]
            or [N, 1]; others are [blocks of rows, blocks of columns].
        scale_dtype: their type if it is float8_e8m0fnu, which is float32 in memory; None for others.
        activations: "fp8", "int8" or None, as in QuantizedWeight.
        input_scale: the name of the one scale of all inputs; None if each row has its own.
        input_dims, input_dtype: its number of dimensions and its type.
    """

    kind: str
    block: tuple[int | None, int | None] = (1, None)
    scale: str = "weight_scale"
    scale_dims: int = 2
    scale_dtype: torch.dtype | None = None
    activations: str | None = None
    input_scale: str | None = None
    input_dims: int = 1
    input_dtype: torch.dtype = torch.float32

    def __str__(self):
        rows, columns = self.block
        scales = "a scale each" if rows is columns is None else "a scale a row"
        if None not in (rows, columns):
            scales = f"blocks of {rows} x {columns}"
        return f"{self.kind}, {scales}"

    def stored(self, N: int, K: int) -> dict[str, Stored]:
        grid = self._grid(N, K)
        found = {
            "weight": Stored((N, K), (DTYPES[self.kind],)),
            self.scale: Stored(grid, FLOATS if self.scale_dtype is None else (self.scale_dtype,)),
            # Of fp8, and of inputs, compressed-tensors has some that are 0.
            "weight_zero_point": Stored(grid, (torch.int8, DTYPES[self.kind]), optional=True),
        }
        if self.input_scale is not None:
            shape = (1,) * self.input_dims
            found[self.input_scale] = Stored(shape, (self.input_dtype,))
            found["input_zero_point"] = Stored(shape, (torch.int8, DTYPES[self.kind]), optional=True)
        return found

    def pack(self, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
        data, scale = tensors["weight"], tensors[self.scale]
        if self.kind == "fp8" and _has_nan(data):
            raise InvalidArgument("weight has values that are not numbers")
        rows, columns = self._block(N, K)
        by_block = math.ceil(N / rows), math.ceil(K / columns)
        scale = scale.float() if self.scale_dtype is not None else scale
        scale = require_finite(self.scale, scale).reshape(by_block)
        zeros = tensors.get("weight_zero_point")
        zeros = None if zeros is None or not zeros.float().any() else zeros.reshape(by_block).T.to(torch.int16)
        if zeros is not None and self.kind == "fp8":
            raise UnsupportedOption("weight_zero_point of fp8 weights must be 0")
        if "input_zero_point" in tensors and tensors["input_zero_point"].float().any():
            raise UnsupportedOption("input_zero_point must be 0: only symmetric activations are supported")
        input_scale = None
        if self.input_scale is not None:
            input_scale = require_finite(self.input_scale, tensors[self.input_scale].float()).reshape(1)
            if input_scale <= 0:
                raise InvalidArgument(f"{self.input_scale} must be positive, not {input_scale.item()}")
        return QuantizedWeight(
            self.kind,
            in_features=K,
            data=data,
            scales=scale.T.contiguous(),
            zeros=None if zeros is None else zeros.contiguous(),
            block=(rows, columns),
            activations=self.activations,
            input_scale=input_scale,
        )

    def unpack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        grid = self._grid(*weight.shape)
        scale = weight.scales.T.reshape(grid)
        if self.scale_dtype is not None:
            scale = scale.to(self.scale_dtype)
        found = {"weight": weight.data.contiguous(), self.scale: scale}
        if weight.zeros is not None:
            found["weight_zero_point"] = weight.zeros.T.reshape(grid).to(torch.int8)
        if self.input_scale is not None:
            found[self.input_scale] = weight.input_scale.reshape((1,) * self.input_dims).to(self.input_dtype)
        return found

    def _block(self, N: int, K: int) -> tuple[int, int]:
        rows, columns = self.block
        return rows or N, columns or K

    def _grid(self, N: int, K: int) -> tuple[int, ...]:
        """The shape in which scales are stored."""
        rows, columns = self._block(N, K)
        return (math.ceil(N / rows), math.ceil(K / columns))[: self.scale_dims]


def _has_nan(data: Tensor) -> bool:
    """Whether float8_e4m3fn [N, K] has values that are no numbers: codes with all bits set but the sign."""
    step = max(1, (1 << 20) // data.shape[1])  # compared a few rows at a time, for there is a copy of them
    return any((rows & 0x7F == 0x7F).any() for rows in data.view(torch.uint8).split(step))
