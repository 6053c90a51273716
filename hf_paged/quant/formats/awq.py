"""AWQ, as autoawq and llm-awq's conversions store it.

    W[n, k] = scales[g, n] * (q[n, k] - z[g, n])        g = k // group_size

Version "gemm": qweight int32 [K, N / 8] and qzeros int32 [G, N / 8] hold 8 columns in a word, even ones in the lower
half; scales [G, N]. Version "gemv": qweight int32 [N, K / 8] and qzeros int32 [N, w] hold values in their order; scales
[N, 8 w]; w is the number of words for G zero points, rounded up to a multiple of 2 for groups of 64 and of 4 for groups
of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight

from ...base.errors import InvalidArgument
from . import words
from .base import FLOATS, Format, Stored, check_group_size, groups_text, packed_rows, require_finite

VERSIONS = ("gemm", "gemv")
_ROW_OF_FIELD = (0, 2, 4, 6, 1, 3, 5, 7)  # of W, in the words of version "gemm"


@dataclass(frozen=True)
class AWQ(Format):
    """AWQ layers of 4 bits.

    Attributes:
        group_size: input features that share a scale; -1: all.
        version: "gemm" or "gemv".
    """

    group_size: int
    version: str = "gemm"

    def __post_init__(self):
        check_group_size(self.group_size)
        if self.version not in VERSIONS:
            raise InvalidArgument(f"version must be one of {VERSIONS}, not {self.version!r}")

    def __str__(self):
        return f"AWQ {self.version} 4 bit, {groups_text(self.group_size)}"

    def stored(self, N: int, K: int) -> dict[str, Stored]:
        size = self._group_size(K)
        if K % size:
            raise InvalidArgument(f"group_size {size} does not divide in_features {K}")
        rows, columns = (K, N) if self.version == "gemm" else (N, K)
        if columns % 8:
            raise InvalidArgument(f"bits: {columns} values of 4 bits do not fill int32 words")
        width = columns if self.version == "gemm" else self._gemv_width(K)
        groups = K // size if self.version == "gemm" else N
        return {
            "qweight": Stored((rows, columns // 8), (torch.int32,)),
            "qzeros": Stored((groups, width // 8), (torch.int32,)),
            "scales": Stored((groups, width), FLOATS),
        }

    def pack(self, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
        scales, qweight, size = require_finite("scales", tensors["scales"]), tensors["qweight"], self._group_size(K)
        if self.version == "gemm":
            zeros = _unpack(tensors["qzeros"].T).T
        else:
            scales = scales[:, : K // size].T
            zeros = words.unpack(tensors["qzeros"], 4)[:, : K // size].T

        def values(rows: slice) -> Tensor:
            if self.version == "gemv":
                return words.unpack(qweight[rows], 4)
            return _unpack(qweight[:, rows.start // 8 : rows.stop // 8].T.contiguous())

        data = packed_rows(4, N, K, values, scales.device)
        weight = QuantizedWeight("int4", in_features=K, data=data, scales=scales.contiguous(), block=(1, size))
        zeros = zeros.to(torch.int16).contiguous()
        return weight if (zeros == weight.zero_point()).all() else weight.with_tensors({"zeros": zeros})

    def unpack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        values, scales, zeros = weight.values(), weight.scales, weight.zeros
        if zeros is None:
            zeros = torch.full_like(scales, weight.zero_point(), dtype=torch.int16)
        if self.version == "gemm":
            return {"qweight": _pack(values).T.contiguous(), "qzeros": _pack(zeros.T).T.contiguous(), "scales": scales}
        surplus = self._gemv_width(weight.in_features) - len(scales)
        scales, zeros = (torch.nn.functional.pad(tensor.T, (0, surplus)) for tensor in (scales, zeros))
        return {"qweight": words.pack(values, 4), "qzeros": words.pack(zeros, 4), "scales": scales}

    def _group_size(self, K: int) -> int:
        return K if self.group_size == -1 else self.group_size

    def _gemv_width(self, K: int) -> int:
        """Number of zero points and scales that are stored for a row."""
        size = self._group_size(K)
        if size not in (32, 64) and size < 128:
            raise InvalidArgument(f"group_size {size} does not exist in version 'gemv', only 32, 64 and from 128 on")
        multiple = {32: 4, 64: 2}.get(size, 1)
        return -(-(K // size) // (8 * multiple)) * 8 * multiple


def _unpack(rows_of_words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [8 R, C]: each word becomes 8 values one below the other."""
    values = torch.empty(len(rows_of_words), 8, rows_of_words.shape[1], dtype=torch.uint8, device=rows_of_words.device)
    for field, row in enumerate(_ROW_OF_FIELD):
        values[:, row] = rows_of_words >> 4 * field & 15
    return values.flatten(0, 1)


def _pack(values: Tensor) -> Tensor:
    """Undoes `_unpack`."""
    rows = values.unflatten(0, (-1, 8))
    packed = torch.zeros(len(rows), values.shape[1], dtype=torch.int32, device=values.device)
    for field, row in enumerate(_ROW_OF_FIELD):
        packed |= rows[:, row].to(torch.int32) << 4 * field
    return packed
