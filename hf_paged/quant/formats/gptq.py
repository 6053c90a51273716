"""GPTQ, as auto-gptq and gptqmodel store it.

    W[n, k] = scales[g, n] * (q[n, k] - z[g, n])        g = g_idx[k]

qweight int32 [K bits / 32, N] holds q along K, qzeros int32 [G, N bits / 32] holds z along N, both from the lowest
bits; scales [G, N]; g_idx int32 [K], k // group_size where it is left out. With act-order g_idx goes up and down; the rows of
qweight stay in the order of the input all the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight

from ...base.errors import InvalidArgument
from . import words
from .base import (
    FLOATS,
    Format,
    Stored,
    check_group_size,
    groups_text,
    in_groups,
    packed_rows,
    require_finite,
    unsigned,
)

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
# What gptqmodel adds to every word of the zero points to get from version 1 to 2: a 1 for each field.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_DAMAGED = (
    "qzeros has fields with all bits set, as auto-gptq stores zero points of 0, which also damages the fields above. "
    "They are read as auto-gptq reads them; quantize again with format gptq_v2 to get what was meant"
)


@dataclass(frozen=True)
class GPTQ(Format):
    """GPTQ layers.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; -1: all.
        version: "gptq" stores zero points less 1, "gptq_v2" as they are.
        whole_words: how "gptq" took the 1 away: gptqmodel from words at a time, so that a field of 0 borrows from the
            next (of 3 bits from every field, modulo 8), auto-gptq from every field. The same unless a zero point is 0.
    """

    bits: int
    group_size: int
    version: str = "gptq"
    whole_words: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise InvalidArgument(f"bits must be one of {BITS}, not {self.bits!r}")
        check_group_size(self.group_size)
        if self.version not in VERSIONS:
            raise InvalidArgument(f"format must be one of {VERSIONS}, not {self.version!r}")

    def __str__(self):
        return f"GPTQ {self.bits} bit, {groups_text(self.group_size)}"

    def stored(self, N: int, K: int) -> dict[str, Stored]:
        for name, size in (("in_features", K), ("out_features", N)):
            if size * self.bits % 32 or self.bits == 3 and size % 32:
                raise InvalidArgument(f"bits: {name} of {size} do not fill int32 words with {self.bits} bits each")
        size = self._group_size(K)
        if K % size:
            raise InvalidArgument(f"group_size {size} does not divide in_features {K}")
        groups = K // size
        return {
            "qweight": Stored((K * self.bits // 32, N), (torch.int32,)),
            "qzeros": Stored((groups, N * self.bits // 32), (torch.int32,)),
            "scales": Stored((groups, N), FLOATS),
            "g_idx": Stored((K,), (torch.int32, torch.int64), optional=True),
        }

    def pack(self, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
        scales = require_finite("scales", tensors["scales"])
        size = self._group_size(K)
        perm = None if "g_idx" not in tensors else in_groups("g_idx", tensors["g_idx"], size)
        qweight = tensors["qweight"].T

        def values(rows: slice) -> Tensor:
            found = words.unpack(qweight[rows].contiguous(), self.bits)
            return found if perm is None else found[:, perm.long()]

        data = packed_rows(self.bits, N, K, values, scales.device)
        zeros = self._zeros(tensors["qzeros"])
        if (zeros >> self.bits).any():
            warnings.warn(_DAMAGED, stacklevel=2)
        if self.bits == 8:
            zeros -= 128
        weight = QuantizedWeight(
            f"int{self.bits}", in_features=K, data=data, scales=scales.contiguous(), block=(1, size), perm=perm
        )
        return weight if (zeros == weight.zero_point()).all() else weight.with_tensors({"zeros": zeros})

    def unpack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        size, zeros = weight.block[1], weight.zeros
        if zeros is None:
            zeros = weight.scales.new_full(weight.scales.shape, weight.zero_point(), dtype=torch.int16)
        if self.bits == 8:
            zeros = zeros + 128
        values = unsigned(weight)
        g_idx = torch.arange(weight.in_features, dtype=torch.int32, device=weight.device) // size
        if weight.perm is not None:
            order = weight.perm.long()
            g_idx = torch.empty_like(g_idx).index_copy_(0, order, g_idx)
            values = torch.empty_like(values).index_copy_(1, order, values)
        qweight = words.pack(values, self.bits).T.contiguous()
        return {"qweight": qweight, "qzeros": self._qzeros(zeros), "scales": weight.scales, "g_idx": g_idx}

    def _group_size(self, K: int) -> int:
        return K if self.group_size == -1 else self.group_size

    def _zeros(self, qzeros: Tensor) -> Tensor:
        """int32 [G, words] -> int16 [G, N]: the zero points."""
        if self.version == "gptq" and self.whole_words and self.bits != 3:
            return words.unpack(self._shifted(qzeros, 1), self.bits).to(torch.int16)
        zeros = words.unpack(qzeros, self.bits).to(torch.int16)
        if self.version == "gptq":
            zeros = zeros + 1
        return zeros & 7 if self.whole_words and self.bits == 3 else zeros

    def _qzeros(self, zeros: Tensor) -> Tensor:
        """Undoes `_zeros`."""
        if self.version == "gptq" and self.whole_words and self.bits != 3:
            return self._shifted(words.pack(zeros, self.bits), -1)
        if self.version == "gptq":
            zeros = zeros - 1
        return words.pack(zeros & (1 << self.bits) - 1, self.bits)

    def _shifted(self, qzeros: Tensor, sign: int) -> Tensor:
        shifted = (qzeros.long() + sign * _ONES[self.bits]) & 0xFFFFFFFF
        return (shifted - (shifted >> 31 << 32)).to(torch.int32)
