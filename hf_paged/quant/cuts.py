"""A rank's part of a quantized layer: some of its outputs, or some of its input features.

Outputs are cut where the words, channels and blocks of the format end. Input features are cut anywhere that words end: a group
that the cut divides keeps its scale on both sides. With act-order a rank's features are of all groups, and of each it has
some number; they are brought together by group, and every group is filled up with features of 0 to whole blocks, because the
kernels' groups are of one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_paged_kernels import fused
from hf_paged_kernels.quantized import BITS, DTYPES, QuantizedWeight
from hf_paged_kernels.ref.quantize import LIMITS

from ..base.errors import InvalidArgument, UnsupportedOption
from .formats.awq import AWQ
from .formats.base import Format, packed_rows, unsigned
from .formats.compressed_tensors import PackQuantized
from .formats.eight_bit import EightBit
from .formats.gptq import GPTQ

LEAST_BLOCK = 16  # input features that share a scale, of a cut layer


@dataclass(frozen=True)
class Cut:
    """Which part of a layer [N, K] a rank has.

    Attributes:
        by_inputs: it has some of the K input features ("rowwise" in transformers' plans), else some of the N outputs.
        rank, size: of the group.
    """

    by_inputs: bool
    rank: int
    size: int

    def local_sizes(self, N: int, K: int) -> tuple[int, int]:
        """(N, K) of every rank's part. Raises UnsupportedOption if they are not of one size."""
        total, name = (K, "in_features") if self.by_inputs else (N, "out_features")
        if total % self.size:
            raise UnsupportedOption(
                f"distributed_config: {name} {total} cannot be dealt out to {self.size} ranks evenly"
            )
        return (N, K // self.size) if self.by_inputs else (N // self.size, K)


@dataclass(frozen=True)
class _Layout:
    """Dimensions of a format's stored tensors. Those not named are whole on every rank.

    Attributes:
        outputs: that which runs along N, by tensor.
        inputs: that which runs along K, value for value.
        groups: that which runs along the groups of K; read whole, and chosen from.
        order: the tensor that has the group of every input feature.
    """

    outputs: dict[str, int]
    inputs: dict[str, int]
    groups: dict[str, int]
    order: str | None = None


def _layout(format: Format) -> _Layout:
    match format:
        case GPTQ():
            outputs = {"qweight": 1, "qzeros": 1, "scales": 1}
            return _Layout(outputs, {"qweight": 0, "g_idx": 0}, {"qzeros": 0, "scales": 0}, "g_idx")
        case AWQ(version="gemm"):
            return _Layout({"qweight": 1, "qzeros": 1, "scales": 1}, {"qweight": 0}, {"qzeros": 0, "scales": 0})
        case PackQuantized():
            outputs = {"weight_packed": 0, "weight_scale": 0, "weight_zero_point": 0}
            groups = {"weight_scale": 1, "weight_zero_point": 1}
            return _Layout(outputs, {"weight_packed": 1, "weight_g_idx": 0}, groups, "weight_g_idx")
        case EightBit():
            scales = (format.scale, "weight_zero_point")
            outputs = {"weight": 0, **({} if format.block[0] is None else dict.fromkeys(scales, 0))}
            return _Layout(outputs, {"weight": 1}, {} if format.block[1] is None else dict.fromkeys(scales, 1))
    raise UnsupportedOption(f"distributed_config: {format} is not sharded")


def dimensions(format: Format, N: int, K: int, cut: Cut) -> dict[str, int]:
    """Along which dimension each stored tensor, and the bias, is dealt out evenly; those left out are whole on every rank.

    Raises UnsupportedOption if the layer cannot be cut so.
    """
    layout, (n, k) = _layout(format), cut.local_sizes(N, K)
    rows, columns = _block(format, N, K)
    if not cut.by_inputs and rows not in (1, N) and n % rows:
        raise UnsupportedOption(f"distributed_config: {n} outputs a rank split the blocks of {rows} x {columns}")
    if cut.by_inputs and columns < K and math.gcd(columns, k) < LEAST_BLOCK:
        raise UnsupportedOption(
            f"distributed_config: {k} input features a rank split the groups of {columns} too finely"
        )
    found = layout.inputs if cut.by_inputs else {**layout.outputs, "bias": 0}
    stored = format.stored(N, K)
    for name, dim in found.items():
        values = (k if cut.by_inputs else n) * cut.size
        if name in stored and (stored[name].shape[dim] % cut.size or _splits_words(format, values, cut)):
            raise UnsupportedOption(
                f"distributed_config: {name} {list(stored[name].shape)} of {format} is not cut into {cut.size} whole parts"
            )
    return dict(found)


def pack_cut(
    format: Format, tensors: dict[str, Tensor], N: int, K: int, cut: Cut
) -> tuple[QuantizedWeight, Tensor | None]:
    """A rank's part of a layer [N, K], from its parts of the stored tensors: (weight, which inputs it takes).

    The second is int64 [features of the weight], where the rank's own number of input features stands for a 0; None: the
    rank's input features as they are.
    """
    (n, k), layout = cut.local_sizes(N, K), _layout(format)
    if "weight_shape" in tensors:
        shape = tensors["weight_shape"]
        if shape.tolist() != [N, K]:
            raise InvalidArgument(f"weight_shape is {shape.tolist()}, not {[N, K]}")
        tensors = {**tensors, "weight_shape": shape.new_tensor([n, k])}
    _, columns = _block(format, N, K)
    if not cut.by_inputs or not layout.groups or columns >= K:
        ordered = layout.order in tensors and (not cut.by_inputs or columns < K)
        tensors = tensors if ordered else {name: tensor for name, tensor in tensors.items() if name != layout.order}
        return _packed(format, tensors, n, k), None
    plain = torch.arange(k, device=tensors[next(iter(layout.inputs))].device) + cut.rank * k
    groups = plain // columns
    own = tensors.pop(layout.order, None) if layout.order else None
    if own is not None and not (own == -1).all() and not torch.equal(own.long(), groups):
        return _act_ordered(format, tensors, own.long(), layout, (n, k, K // columns))
    size = math.gcd(columns, k)
    return _packed(_with_columns(format, size), _chosen(tensors, layout, groups[::size]), n, k), None


def _act_ordered(
    format: Format, tensors: dict[str, Tensor], groups: Tensor, layout: _Layout, sizes: tuple[int, int, int]
):
    """Scales of all groups go through `format.pack` as if they were those of smaller ones, in the order of the groups."""
    n, k, count = sizes
    if groups.min() < 0 or groups.max() >= count:
        raise InvalidArgument(
            f"{layout.order} has groups {int(groups.min())} to {int(groups.max())} where there are {count}"
        )
    size = next(size for size in range(max(1, k // count), 0, -1) if k % size == 0)
    slots = torch.arange(k // size, device=groups.device).clamp(max=count - 1)
    weight = _packed(_with_columns(format, size), _chosen(tensors, layout, slots), n, k)
    tables = {
        name: table[:count] for name, table in (("scales", weight.scales), ("zeros", weight.zeros)) if table is not None
    }
    counts = torch.bincount(groups, minlength=count)
    bits = BITS[weight.kind]
    block = _best_block(counts, bits, 16 * len(tables))
    blocks = (counts + block - 1) // block  # of every group
    order, starts = torch.argsort(groups, stable=True), (blocks.cumsum(0) - blocks) * block
    before = counts.cumsum(0) - counts
    ordered = groups[order]
    places = starts[ordered] + torch.arange(k, device=groups.device) - before[ordered]
    width = int(blocks.sum()) * block
    takes = torch.full((width,), k, device=groups.device).index_copy_(0, places, order)
    columns = takes.clamp(max=k - 1)  # what a 0 is multiplied with does not matter
    values = unsigned(weight)
    data = packed_rows(bits, n, width, lambda rows: values[rows][:, columns], groups.device)
    owners = torch.arange(count, device=groups.device).repeat_interleave(blocks)
    tables = {name: table[owners].contiguous() for name, table in tables.items()}
    return QuantizedWeight(weight.kind, width, data, block=(1, block), **tables), takes


def _best_block(counts: Tensor, bits: int, table_bits: int) -> int:
    """The power of two for which the rank's groups, filled up to whole blocks, take the least memory."""
    sizes = [LEAST_BLOCK << step for step in range(7)]
    return min(sizes, key=lambda size: int(((counts + size - 1) // size).sum()) * (size * bits + table_bits))


def _packed(format: Format, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
    format.check(tensors, N, K)
    return format.pack(tensors, N, K)


def _chosen(tensors: dict[str, Tensor], layout: _Layout, groups: Tensor) -> dict[str, Tensor]:
    chosen = {}
    for name, dim in layout.groups.items():
        if name in tensors:  # 8-bit floats are not chosen from as such
            tensor = tensors[name]
            as_bytes = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            chosen[name] = as_bytes.index_select(dim, groups).view(tensor.dtype)
    return {**tensors, **chosen}


def _block(format: Format, N: int, K: int) -> tuple[int, int]:
    if isinstance(format, EightBit):
        return format.block[0] or N, format.block[1] or K
    return 1, K if format.group_size == -1 else format.group_size


def _with_columns(format: Format, size: int) -> Format:
    if isinstance(format, EightBit):
        return replace(format, block=(format.block[0], size))
    return replace(format, group_size=size)


def _splits_words(format: Format, total: int, cut: Cut) -> bool:
    """Whether the boundaries between ranks are inside of words."""
    per_rank = total // cut.size
    match format:
        case GPTQ(bits=bits):
            return per_rank * bits % 32 != 0 or bits == 3 and per_rank % 32 != 0
        case AWQ():
            return per_rank % 8 != 0 and not cut.by_inputs
        case PackQuantized(bits=bits, symmetric=symmetric):
            return per_rank % (32 // bits) != 0 and (cut.by_inputs or not symmetric)
    return False


def rounded_jointly(layer, input: Tensor, backend: str, largest: Callable[[Tensor], Tensor]) -> Tensor:
    """A rank's product of a layer that is cut by inputs [..., K of its own], without the bias, before the sum over ranks.

    Where the weight has inputs rounded to 8 bits, with a scale for each row, it is the scale of the whole row, that one
    process would have.

    Args:
        largest: the elementwise maximum over all ranks.
    """
    weight, x = layer.quantized, layer.taken(input)
    kind = fused.rounds_to(weight, backend=backend)
    if kind is not None and weight.input_scale is None:
        peak = x.float().abs().amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        scale = largest(peak).clamp(min=1e-30)[..., None] / LIMITS[DTYPES[kind]]
        y = x.float() / scale
        y = y.nan_to_num(0).round() if kind == "int8" else y
        x = (y.to(DTYPES[kind]).float() * scale).to(x.dtype)
        weight = replace(weight, activations=None)
    return fused.linear(x, weight, None, backend=backend)
