"""compressed-tensors, as llmcompressor stores it: formats by groups of layers, chosen by name or class.

    W[n, k] = weight_scale[n, g] * (q[n, k] - z[n, g])

"pack-quantized": weight_packed int32 [N, ceil(K / f)] with f = 32 // bits values in a word, from the lowest bits;
weight_scale [N, G]; weight_zero_point int32 [ceil(N / f), G], packed along N, if not symmetric; weight_shape [2];
weight_g_idx [K] with act-order. Values and zero points are stored 2^(bits - 1) too large.
"float-quantized", "int-quantized": see eight_bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight

from ...base.errors import InvalidArgument, UnsupportedOption
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
from .eight_bit import EightBit

BITS = (2, 3, 4, 8)  # of packed weights


@dataclass(frozen=True)
class PackQuantized(Format):
    """Layers of 2, 3, 4 or 8 bits that are packed, "pack-quantized".

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; -1: all.
        symmetric: all zero points are 0 and not stored.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    def __post_init__(self):
        if self.bits not in BITS:
            raise InvalidArgument(f"num_bits must be one of {BITS}, not {self.bits!r}")
        check_group_size(self.group_size)

    def __str__(self):
        return f"pack-quantized {self.bits} bit, {groups_text(self.group_size)}"

    def stored(self, N: int, K: int) -> dict[str, Stored]:
        size = self._group_size(K)
        if K % size:
            raise InvalidArgument(f"group_size {size} does not divide in_features {K}")
        found = {
            "weight_packed": Stored((N, self._words(K)), (torch.int32,)),
            "weight_scale": Stored((N, K // size), FLOATS),
            "weight_shape": Stored((2,), (torch.int64, torch.int32)),
            "weight_g_idx": Stored((K,), (torch.int32, torch.int64), optional=True),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Stored((self._words(N), K // size), (torch.int32,))
        return found

    def pack(self, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
        scale, words = require_finite("weight_scale", tensors["weight_scale"]), tensors["weight_packed"]
        if tensors["weight_shape"].tolist() != [N, K]:
            raise InvalidArgument(f"weight_shape is {tensors['weight_shape'].tolist()}, not {[N, K]}")
        size, g_idx = self._group_size(K), tensors.get("weight_g_idx")
        perm = None if g_idx is None or (g_idx == -1).all() else in_groups("weight_g_idx", g_idx, size)

        def values(rows: slice) -> Tensor:
            found = self._unpack(words[rows], K)
            return found if perm is None else found[:, perm.long()]

        data = packed_rows(self.bits, N, K, values, scale.device)
        weight = QuantizedWeight(
            f"int{self.bits}", in_features=K, data=data, scales=scale.T.contiguous(), block=(1, size), perm=perm
        )
        if self.symmetric:
            return weight
        zeros = self._unpack(tensors["weight_zero_point"].T, N).to(torch.int16)
        zeros -= (1 << self.bits - 1) - weight.zero_point()
        return weight if (zeros == weight.zero_point()).all() else weight.with_tensors({"zeros": zeros.contiguous()})

    def unpack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        values = unsigned(weight)
        found = {
            "weight_scale": weight.scales.T.contiguous(),
            "weight_shape": torch.tensor(weight.shape, device=weight.device),
        }
        if weight.perm is not None:
            order = weight.perm.long()
            groups = torch.arange(len(order), dtype=torch.int32, device=weight.device) // weight.block[1]
            found["weight_g_idx"] = torch.empty_like(groups).index_copy_(0, order, groups)
            values = torch.empty_like(values).index_copy_(1, order, values)
        found["weight_packed"] = self._pack(values)
        if not self.symmetric:
            zeros = weight.zeros
            if zeros is None:
                zeros = weight.scales.new_full(weight.scales.shape, weight.zero_point(), dtype=torch.int16)
            zeros = zeros + (1 << self.bits - 1) - weight.zero_point()
            found["weight_zero_point"] = self._pack(zeros).T.contiguous()
        return found

    def _group_size(self, K: int) -> int:
        return K if self.group_size == -1 else self.group_size

    def _words(self, count: int) -> int:
        return -(-count // (32 // self.bits))

    def _unpack(self, words: Tensor, count: int) -> Tensor:
        """int32 [R, words] -> uint8 [R, count]"""
        mask = (1 << self.bits) - 1
        fields = [(words >> self.bits * field & mask).to(torch.uint8) for field in range(32 // self.bits)]
        return torch.stack(fields, -1).flatten(-2)[:, :count]

    def _pack(self, values: Tensor) -> Tensor:
        """Undoes `_unpack`; rows are filled up with fields of 0."""
        fields = 32 // self.bits
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % fields))
        words = torch.zeros(len(values), values.shape[1] // fields, dtype=torch.int32, device=values.device)
        for field in range(fields):
            words |= values[:, field::fields].to(torch.int32) << self.bits * field
        return words


def layer_format(config: dict, name: str, classes: list[str], tensors: dict[str, Tensor]) -> Format:
    """The format of a layer.

    Args:
        config: the checkpoint's `quantization_config`.
        name: of the layer.
        classes: names of its module's class and of that class's bases.
        tensors: the layer's, for their types and shapes.

    Raises InvalidArgument, beginning with the setting or the tensor that is wrong.
    """
    scheme = _scheme(config, name, classes)
    weights, inputs = scheme.get("weights") or {}, scheme.get("input_activations")
    if scheme.get("output_activations"):
        raise UnsupportedOption("output_activations are not supported")
    if "weight_packed" in tensors:
        if weights.get("type", "int") != "int":
            raise UnsupportedOption(f"type {weights['type']} is not supported for packed weights, only int")
        if inputs:
            raise UnsupportedOption("input_activations are not supported for packed weights")
        size = weights.get("group_size") if weights.get("strategy") == "group" else -1
        return PackQuantized(weights.get("num_bits"), size, weights.get("symmetric", True))
    return _eight_bit(weights, inputs, tensors)


def _eight_bit(weights: dict, inputs: dict | None, tensors: dict[str, Tensor]) -> EightBit:
    kind = "fp8" if weights.get("type") == "float" else "int8"
    bits = weights.get("num_bits")
    if not isinstance(bits, int) or bits > 8 or kind == "fp8" and bits != 8:
        raise InvalidArgument(f"num_bits must be 8, not {bits!r}")
    scale = tensors.get("weight_scale")
    if scale is None:
        raise InvalidArgument("weight_scale is missing")
    options = {}
    if inputs is not None:
        _check_inputs(inputs, kind)
        options["activations"] = kind
        if not inputs.get("dynamic"):
            if "input_scale" not in tensors:
                raise InvalidArgument("input_scale is missing")
            found = tensors["input_scale"]
            options |= dict(input_scale="input_scale", input_dims=found.dim(), input_dtype=found.dtype)
    return EightBit(kind, block=_block(weights), scale_dims=scale.dim(), **options)


def _block(weights: dict) -> tuple[int | None, int | None]:
    strategy = weights.get("strategy")
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    size = weights.get("group_size") if strategy == "group" else weights.get("block_structure")
    if strategy == "group" and isinstance(size, int) and size > 0:
        return 1, size
    if strategy == "block" and isinstance(size, list | tuple) and len(size) == 2 and all(side > 0 for side in size):
        return tuple(size)
    raise InvalidArgument(f"strategy {strategy!r} with group_size or block_structure {size!r} is not supported")


def _check_inputs(inputs: dict, kind: str) -> None:
    """Each row of inputs gets a scale of its own, where the tool may take one for a call's rows, or some for a row."""
    if inputs.get("type") != {"fp8": "float", "int8": "int"}[kind] or inputs.get("num_bits") != 8:
        given = f"{inputs.get('num_bits')!r} bits of type {inputs.get('type')!r}"
        raise UnsupportedOption(f"input_activations of {given} are not supported with {kind} weights")
    if not inputs.get("symmetric", True):
        raise UnsupportedOption("input_activations must be symmetric")
    if not inputs.get("dynamic") and inputs.get("strategy") != "tensor":
        raise UnsupportedOption(
            f"input_activations: static ones with strategy {inputs.get('strategy')!r} are not supported"
        )
    if inputs.get("dynamic") not in (True, False, None):
        raise UnsupportedOption(f"input_activations: dynamic {inputs['dynamic']!r} is not supported")


def _scheme(config: dict, name: str, classes: list[str]) -> dict:
    """The settings of a layer: those that name it, else whose pattern does, else that name its class."""
    groups = config.get("config_groups") or {}
    if (config.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedOption("transform_config is not supported")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnsupportedOption(f"sparsity_config: format {sparsity!r} is not supported")
    targets = [(target, group) for group in groups.values() for target in group["targets"]]
    for fits in (
        lambda target: target == name,
        lambda target: _is_match(target, name),
        lambda target: target in classes,
    ):
        for target, group in targets:
            if fits(target):
                return group
    raise InvalidArgument("config_groups has no group for a layer that the checkpoint has quantized tensors of")


def _is_match(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None
