"""The one layout that quantized weights have in memory, whatever format they were stored in.

    W[n, perm[k]] = scale(n, k) * (q[n, k] - zero(n, k))

int8 and fp8 (e4m3) values lie as they are, [N, K]. Narrower ones are packed into int32 words, each row for itself, in
blocks of LANES words: field f (from the lowest bits) of word j of a block holds value f * LANES + j of the block. So
one shift of LANES words side by side gives LANES values side by side, on a CPU's vector as in a tile of a GPU's, and
nothing has to be shuffled. A word has `FIELDS` fields: 16 of 2 bits, 10 of 3 bits (2 bits stay unused), 8 of 4 bits. A
row is filled up with fields of 0 to whole blocks; kernels give those no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

LANES = 16
BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp8": 8}
FIELDS = {"int2": 16, "int3": 10, "int4": 8}  # of an int32 word
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of data that is not packed
ACTIVATIONS = (None, "int8", "fp8")
_SHARED = ("perm", "input_scale")  # by all experts


def words_of(kind: str, K: int) -> int:
    """Number of int32 words in a row of K values of a packed kind."""
    return math.ceil(K / (LANES * FIELDS[kind])) * LANES


def pack(values: Tensor, kind: str) -> Tensor:
    """Values [..., K] in [0, 2^bits) -> int32 [..., words]."""
    bits, count = BITS[kind], FIELDS[kind]
    K = values.shape[-1]
    filled = torch.nn.functional.pad(values, (0, words_of(kind, K) * count - K))
    by_field = filled.unflatten(-1, (-1, count, LANES))
    words = torch.zeros(*by_field.shape[:-2], LANES, dtype=torch.int32, device=values.device)
    for field in range(count):
        words |= by_field[..., field, :].to(torch.int32) << bits * field
    return words.flatten(-2)


def unpack(words: Tensor, kind: str, K: int) -> Tensor:
    """int32 [..., words] -> uint8 [..., K]."""
    bits, count = BITS[kind], FIELDS[kind]
    blocks = words.unflatten(-1, (-1, LANES))
    values = [(blocks >> bits * field & (1 << bits) - 1).to(torch.uint8) for field in range(count)]
    return torch.stack(values, dim=-2).flatten(-3)[..., :K]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight W [N, K], or one [N, K] for each of E experts; then every tensor but `perm` has a first dimension E.

    Attributes:
        kind: "int2", "int3", "int4" (packed), "int8" or "fp8" (e4m3).
        in_features: K.
        data: int32 [N, words], int8 [N, K] or float8_e4m3fn [N, K]. Unit stride along a row, rows any stride apart.
        scales: [ceil(K / columns), ceil(N / rows)] with (rows, columns) = `block`: one for each such block of W. A
            floating type; they are read in fp32. Unit stride along N, other strides free.
        zeros: int16, of the scales' shape; None: 0 for int8 and fp8, 2^(bits - 1) for packed kinds.
        block: (rows, columns) that share a scale. Rows are 1 for packed kinds. One scale for all: (N, K).
        perm: int32 [K]: column k of the data stands for input feature perm[k]. None: for feature k.
        activations: the type to which rows of the input are rounded before the product, each with a scale of its own (or
            with `input_scale`), so that hardware can multiply in 8 bits: "int8" or "fp8". None: they are not rounded.
        input_scale: float32 [1]: the one scale of all inputs ever, where it was found beforehand.
    """

    kind: str
    in_features: int
    data: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    block: tuple[int, int] = (1, 0)
    perm: Tensor | None = None
    activations: str | None = None
    input_scale: Tensor | None = None

    def __post_init__(self):
        """Raises ValueError, naming the attribute, for what does not fit together."""
        _check(self)

    @property
    def shape(self) -> torch.Size:
        """[N, K] or [E, N, K]."""
        return torch.Size((*self.data.shape[:-1], self.in_features))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def is_packed(self) -> bool:
        return self.kind in FIELDS

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Attribute -> tensor, those that are not None."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> QuantizedWeight:
        """The same with other tensors in place of some."""
        return replace(self, **tensors)

    def values(self) -> Tensor:
        """q [..., N, K]: uint8 of packed kinds, else the data."""
        return unpack(self.data, self.kind, self.in_features) if self.is_packed else self.data

    def zero_point(self) -> int:
        """What `zeros` of None stands for."""
        return 1 << BITS[self.kind] - 1 if self.is_packed else 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [..., N, K], computed in fp32 and rounded to `dtype` once, with its columns in the order of the input."""
        N, K = self.shape[-2:]
        rows, columns = self.block

        def spread(tensor: Tensor) -> Tensor:
            """[..., blocks of columns, blocks of rows] -> [..., N, K]"""
            tensor = tensor.transpose(-1, -2)
            tensor = tensor if rows == 1 else tensor.repeat_interleave(rows, -2)[..., :N, :]
            return tensor.repeat_interleave(columns, -1)[..., :K]

        weight = self.values().float()
        weight -= self.zero_point() if self.zeros is None else spread(self.zeros)
        weight *= spread(self.scales.float())
        if self.perm is not None:
            weight = torch.empty_like(weight).index_copy_(-1, self.perm.long(), weight)
        return weight.to(dtype)

    def narrow(self, start: int, length: int) -> QuantizedWeight:
        """Rows `start` to `start + length` of W, as views. Raises ValueError if they split blocks."""
        rows, end = self.block[0], start + length
        if start % rows or end % rows and end != self.shape[-2]:
            raise ValueError(f"start, length: rows {start} to {end} split blocks of {rows} rows")
        first, count = start // rows, math.ceil(length / rows)
        tensors = {"data": self.data.narrow(-2, start, length), "scales": self.scales.narrow(-1, first, count)}
        if self.zeros is not None:
            tensors["zeros"] = self.zeros.narrow(-1, first, count)
        return self.with_tensors(tensors)

    def expert(self, index: int) -> QuantizedWeight:
        """W of one of E experts, as views."""
        own = {name: tensor[index] for name, tensor in self.tensors().items() if name not in _SHARED}
        return self.with_tensors(own)

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Consecutive rows of W, as views; undoes `cat`."""
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [self.narrow(start, size) for start, size in zip(starts, sizes)]


def why_not_joined(weights: Sequence[QuantizedWeight]) -> str | None:
    """Why `cat` cannot join these weights, or None if it can."""
    first = weights[0]
    for weight in weights[1:]:
        for name in ("kind", "in_features", "activations", "device"):
            if getattr(weight, name) != getattr(first, name):
                return f"{name} differs"
        if weight.data.shape[:-2] != first.data.shape[:-2]:
            return "number of experts differs"
        if weight.scales.dtype != first.scales.dtype or (weight.zeros is None) != (first.zeros is None):
            return "scales or zeros differ in type"
        for name in ("perm", "input_scale"):
            mine, other = getattr(first, name), getattr(weight, name)
            if (mine is None) != (other is None) or mine is not None and not torch.equal(mine, other):
                return f"{name} differs"
    block = _joint_block(weights)
    if block is None:
        return "block differs"
    rows = block[0]
    if any(weight.shape[-2] % rows for weight in weights[:-1]):
        return f"blocks of {rows} rows do not end with the weights"
    return None


def cat(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights one below the other, [N1 + N2 + ..., K], in new memory. Weights with one scale each get one for each row.

    Raises ValueError with the reason if they cannot be joined.
    """
    reason = why_not_joined(weights)
    if reason is not None:
        raise ValueError(f"weights cannot be joined: {reason}")
    rows, columns = _joint_block(weights)

    def join(name: str) -> Tensor:
        scales = (_per_row(getattr(weight, name), weight) if rows == 1 else getattr(weight, name) for weight in weights)
        return torch.cat(list(scales), -1)

    tensors = {"data": torch.cat([weight.data for weight in weights], -2), "scales": join("scales")}
    if weights[0].zeros is not None:
        tensors["zeros"] = join("zeros")
    return replace(weights[0], block=(rows, columns), **tensors)


def why_not_stacked(weights: Sequence[QuantizedWeight]) -> str | None:
    """Why `stack` cannot stack these weights [N, K], or None if it can."""
    first = weights[0]
    for weight in weights[1:]:
        if {**_layout(weight), "zeros": None} != {**_layout(first), "zeros": None}:
            return "they have different layouts"
        for name in _SHARED:
            mine, other = getattr(first, name), getattr(weight, name)
            if mine is not None and not torch.equal(mine, other):
                return f"{name} differs"
    return None


def stack(weights: Iterable[QuantizedWeight], count: int) -> QuantizedWeight:
    """The `count` weights [N, K], of which `why_not_stacked` says nothing, as one [count, N, K] in new memory.

    They are taken one after the other, and not kept.
    """
    result = None
    for index, weight in enumerate(weights):
        if result is None:
            own = {name: tensor for name, tensor in weight.tensors().items() if name not in _SHARED}
            result = weight.with_tensors({name: t.new_empty(count, *t.shape) for name, t in own.items()})
        if weight.zeros is not None and result.zeros is None:
            zeros = weight.zeros.new_full((count, *weight.zeros.shape), weight.zero_point())
            result = result.with_tensors({"zeros": zeros})
        elif weight.zeros is None and result.zeros is not None:
            result.zeros[index] = weight.zero_point()
        for name, tensor in weight.tensors().items():
            if name not in _SHARED:
                getattr(result, name)[index] = tensor
    return result


def with_block(weight: QuantizedWeight, block: tuple[int, int]) -> QuantizedWeight:
    """A weight whose block `cat` made one row high, with a scale for as many rows as before: those of a block agree."""
    if weight.block == block:
        return weight
    tensors = {name: tensor[..., :: block[0]] for name, tensor in weight.tensors().items() if name in ("scales", "zeros")}
    return replace(weight, block=block, **tensors)


def same_layout(weight: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether the two differ in nothing but their values."""
    return _layout(weight) == _layout(other)


def _layout(weight: QuantizedWeight) -> dict:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: (v.shape, v.dtype) if isinstance(v, Tensor) else v for name, v in values.items()}


def _joint_block(weights: Sequence[QuantizedWeight]) -> tuple[int, int] | None:
    """The block of them all; with rows of 1 where no weight has several blocks of more along N. None: they differ."""
    blocks = {weight.block for weight in weights}
    if len({columns for _, columns in blocks}) > 1:
        return None
    if all(weight.block[0] == 1 or weight.block[0] >= weight.shape[-2] for weight in weights):
        return 1, weights[0].block[1]
    return blocks.pop() if len(blocks) == 1 else None


def _per_row(scales: Tensor, weight: QuantizedWeight) -> Tensor:
    return scales.expand(*scales.shape[:-1], weight.shape[-2])


def _check(weight: QuantizedWeight) -> None:
    kind, K, data = weight.kind, weight.in_features, weight.data
    if kind not in BITS:
        raise ValueError(f"kind must be one of {', '.join(BITS)}, not {kind!r}")
    if weight.activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, not {weight.activations!r}")
    dtype, width = (torch.int32, words_of(kind, K)) if weight.is_packed else (DTYPES[kind], K)
    if data.dtype != dtype or data.dim() not in (2, 3) or data.shape[-1] != width:
        raise ValueError(f"data must be {dtype} [N, {width}] for {kind} of {K} features, not {_describe(data)}")
    rows, columns = weight.block
    if rows < 1 or columns < 1 or weight.is_packed and rows != 1:
        raise ValueError(f"block {weight.block} is no (rows, columns) of {kind} weights")
    N = data.shape[-2]
    shape = (*data.shape[:-2], math.ceil(K / columns), math.ceil(N / rows))
    if weight.scales.shape != shape or not weight.scales.is_floating_point():
        raise ValueError(f"scales must be floats {list(shape)}, not {_describe(weight.scales)}")
    if weight.zeros is not None and (weight.zeros.shape != shape or weight.zeros.dtype != torch.int16):
        raise ValueError(f"zeros must be int16 {list(shape)}, not {_describe(weight.zeros)}")
    if weight.perm is not None and (weight.perm.shape != (K,) or weight.perm.dtype != torch.int32):
        raise ValueError(f"perm must be int32 [{K}], not {_describe(weight.perm)}")
    scale = weight.input_scale
    if scale is not None and (scale.shape != (1,) or scale.dtype != torch.float32 or weight.activations is None):
        raise ValueError(f"input_scale must be float32 [1], with activations, not {_describe(scale)}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
