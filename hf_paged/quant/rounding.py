"""Rounding weights to a grid: scales and zero points of groups, and plain rounding to nearest.

A group is `group_size` columns of one row. Its grid is scale * (q - zero), q in [0, 2^bits).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight, pack

from ..base.errors import InvalidArgument

WIDTHS = (2, 3, 4, 8)  # bits
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # that readers of GPTQ and AWQ checkpoints take, besides -1
FP8_LARGEST = 448.0  # of float8_e4m3fn
LEAST_SCALE = 2.0**-24  # above 0 in fp16
CHUNK = 1 << 22  # values that are rounded at a time, so that little memory is needed beside the weight
# By how much a grid may be narrower than its values: what is beyond it is cut off, and all the rest is finer.
SHRINKS = tuple(1 - 0.04 * step for step in range(9))


@dataclass(frozen=True)
class Scheme:
    """How a weight is rounded to integers.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a grid; -1: all of a row.
        symmetric: the zero point is 2^(bits - 1) everywhere, else each group has its own.
        zero_from: the least zero point. 1 for GPTQ, whose files hold zero - 1 and have two ways to read a zero of 0.

    Raises:
        InvalidArgument: bits or group_size is none of those.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    zero_from: int = 0

    def __post_init__(self):
        if self.bits not in WIDTHS:
            raise InvalidArgument(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {self.bits!r}")
        if self.group_size != -1 and self.group_size not in GROUP_SIZES:
            raise InvalidArgument(f"group_size must be -1 or one of {GROUP_SIZES}, got {self.group_size!r}")

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    def columns(self, K: int) -> int:
        """Columns of a group of a weight [N, K]. Raises InvalidArgument if groups do not fill its rows."""
        size = K if self.group_size == -1 else self.group_size
        if K % size:
            raise InvalidArgument(f"group_size {size} does not divide {K} input features")
        return size


@dataclass(frozen=True)
class Grid:
    """Grids of groups: `scales` and `zeros` are fp32 [..., 1] beside the groups' values [..., columns]."""

    scales: Tensor
    zeros: Tensor
    largest: int

    def nearest(self, values: Tensor) -> Tensor:
        """q, in fp32."""
        return (values / self.scales + self.zeros).round_().clamp_(0, self.largest)

    def rounded(self, values: Tensor) -> Tensor:
        return (self.nearest(values) - self.zeros) * self.scales


def fit(values: Tensor, scheme: Scheme, *, lowest: Tensor | None = None, highest: Tensor | None = None) -> Grid:
    """The grids that reach from the least to the largest of `values` [..., columns], 0 among them.

    `lowest` and `highest` [..., 1] are used in place of those. Scales are rounded to fp16, as checkpoints have them.
    """
    lowest = values.amin(-1, keepdim=True) if lowest is None else lowest
    highest = values.amax(-1, keepdim=True) if highest is None else highest
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    steps = scheme.largest
    if scheme.symmetric:
        scales = _storable(torch.maximum(-lowest, highest) * (2 / steps))
        return Grid(scales, torch.full_like(scales, (steps + 1) // 2), steps)
    # A zero point of at least `zero_from` leaves only the steps above it for what is positive.
    scales = torch.maximum((highest - lowest) / steps, highest / (steps - scheme.zero_from))
    scales = _storable(scales)
    return Grid(scales, (-lowest / scales).round_().clamp_(scheme.zero_from, steps), steps)


def fit_best(values: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
    """Of the grids `SHRINKS` times as wide as the values [..., columns], for each group that of the least squared error.

    `importance` [columns], or [..., columns]: the weight of each value in that error.
    """
    lowest, highest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    best, least = None, None
    for shrink in SHRINKS:
        grid = fit(values, scheme, lowest=lowest * shrink, highest=highest * shrink)
        error = (grid.rounded(values) - values).square_()
        error = (error if importance is None else error * importance).sum(-1, keepdim=True)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(*(torch.where(better, *pair) for pair in ((grid.scales, best.scales), (grid.zeros, best.zeros))), grid.largest)  # fmt: skip
    return best


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """weight [N, K] with every value at the nearest point of its group's best grid."""
    columns = scheme.columns(weight.shape[-1])
    parts = []
    for rows in weight.split(max(1, CHUNK // weight.shape[-1])):
        groups = rows.float().unflatten(-1, (-1, columns))
        grid = fit_best(groups, scheme)
        parts.append((grid.nearest(groups).flatten(-2).to(torch.uint8), grid.scales[..., 0].T, grid.zeros[..., 0].T))
    q, scales, zeros = zip(*parts)
    return assemble(torch.cat(q), torch.cat(scales, -1), torch.cat(zeros, -1), scheme)


def round_to_fp8(weight: Tensor) -> QuantizedWeight:
    """weight [N, K] in e4m3, each row with a scale of its own in the weight's type; inputs are rounded to fp8, too."""
    N, K = weight.shape
    scales = (weight.abs().amax(-1, keepdim=True).float() / FP8_LARGEST).clamp(min=1e-7).to(weight.dtype)
    data = weight.new_empty(N, K, dtype=torch.float8_e4m3fn)
    size = max(1, CHUNK // K)
    for part, rows, scale in zip(data.split(size), weight.split(size), scales.split(size)):
        part.copy_((rows.float() / scale.float()).clamp_(-FP8_LARGEST, FP8_LARGEST))
    return QuantizedWeight("fp8", K, data, scales.T.contiguous(), block=(1, K), activations="fp8")


def assemble(
    q: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, perm: Tensor | None = None
) -> QuantizedWeight:
    """The weight of whole numbers q [N, K] in [0, 2^bits), with scales and zeros [K / columns, N].

    `perm` [K]: column k of q stands for input feature perm[k].
    """
    K = q.shape[-1]
    kind = f"int{scheme.bits}"
    zeros = None if scheme.symmetric else zeros.to(torch.int16).contiguous()
    if scheme.bits == 8:  # the layout has signed bytes
        data, zeros = (q - 128).to(torch.int8), None if zeros is None else zeros - 128
    else:
        data = pack(q.to(torch.uint8), kind)
    perm = None if perm is None else perm.to(torch.int32)
    scales = scales.to(torch.float16).contiguous()
    return QuantizedWeight(kind, K, data, scales, zeros, block=(1, scheme.columns(K)), perm=perm)


def largest_group(K: int, most: int) -> int | None:
    """The largest group size up to `most` that divides K; None if there is none."""
    return max((size for size in GROUP_SIZES if size <= most and K % size == 0), default=None)


def _storable(scales: Tensor) -> Tensor:
    """As fp16 has them, and none of them 0: a group of zeros gets 1."""
    scales = torch.where(scales > 0, scales, 1.0).clamp(LEAST_SCALE, torch.finfo(torch.float16).max)
    return scales.to(torch.float16).float()
