"""Tiny models with quantized linear layers, rounded to nearest, and their dequantized twins."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from hf_paged.quant.formats.base import FLOATS, Format, Stored
from hf_paged.quant.linear import QuantLinear
from hf_paged_kernels.quantized import BITS, DTYPES, QuantizedWeight, pack, words_of

LIMITS = {"int8": 127, "fp8": 448.0}


@dataclass(frozen=True)
class Scheme:
    """How a weight is rounded. A `group` of None: one for all columns; `rows` of None: one for all rows."""

    kind: str
    group: int | None = None
    rows: int | None = 1
    zeros: bool = False
    order: bool = False
    activations: str | None = None
    input_scale: float | None = None


SCHEMES = {
    "int4": Scheme("int4", group=16),
    "int4-zeros-order": Scheme("int4", group=16, zeros=True, order=True),
    "int4-odd-groups": Scheme("int4", group=12),  # no kernel takes these
    "int3": Scheme("int3", group=16, zeros=True),
    "int8": Scheme("int8"),
    "w8a8": Scheme("int8", activations="int8"),
    "fp8": Scheme("fp8", activations="fp8"),
    "fp8-static": Scheme("fp8", rows=None, activations="fp8", input_scale=0.02),
    "fp8-blocks": Scheme("fp8", group=16, rows=8, activations="fp8"),
}


@dataclass(frozen=True)
class AsIs(Format):
    """Stores the kernels' own layout, each tensor under its attribute's name."""

    scheme: Scheme

    def stored(self, N: int, K: int) -> dict[str, Stored]:
        scheme = self.scheme
        rows, columns = block_of(scheme, N, K)
        shape = (-(-K // columns), -(-N // rows))
        packed = scheme.kind not in DTYPES
        data = ((N, words_of(scheme.kind, K)), torch.int32) if packed else ((N, K), DTYPES[scheme.kind])
        found = {"data": Stored(data[0], (data[1],)), "scales": Stored(shape, FLOATS)}
        found |= {"zeros": Stored(shape, (torch.int16,))} if scheme.zeros else {}
        found |= {"perm": Stored((K,), (torch.int32,))} if scheme.order else {}
        return found | ({"input_scale": Stored((1,), (torch.float32,))} if scheme.input_scale else {})

    def pack(self, tensors: dict, N: int, K: int) -> QuantizedWeight:
        scheme = self.scheme
        return QuantizedWeight(
            scheme.kind, K, block=block_of(scheme, N, K), activations=scheme.activations,
            **{name: tensor.clone() for name, tensor in tensors.items()},
        )  # fmt: skip

    def unpack(self, weight: QuantizedWeight) -> dict:
        return {name: tensor.clone() for name, tensor in weight.tensors().items()}

    def __str__(self) -> str:
        return f"as it is, {self.scheme.kind}"


def block_of(scheme: Scheme, N: int, K: int) -> tuple[int, int]:
    return scheme.rows or N, scheme.group or K


def quantize(W: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """W [N, K], rounded to nearest."""
    N, K = W.shape
    rows, columns = block_of(scheme, N, K)
    # as different siblings of one input have it, in act-order checkpoints: the same order
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(K)) if scheme.order else torch.arange(K)
    W = W.float()[:, perm]
    full = nn.functional.pad(W, (0, -K % columns, 0, -N % rows))
    blocks = full.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [N blocks, rows, K blocks, columns]
    zeros = None
    if scheme.zeros:
        low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
        most = (1 << BITS[scheme.kind]) - 1
        scale = (high - low).clamp_min(1e-8) / most
        zeros = (-low / scale).round().clamp(0, most)
    else:
        most = LIMITS.get(scheme.kind, (1 << BITS[scheme.kind] - 1) - 1)
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-8) / most

    def spread(values):
        return values.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]

    q = W / spread(scale)
    if scheme.kind == "fp8":
        data = q.to(torch.float8_e4m3fn)
    elif scheme.kind == "int8":
        data = q.round().clamp(-127, 127).to(torch.int8)
    else:
        shift = spread(zeros) if zeros is not None else 1 << BITS[scheme.kind] - 1
        data = pack((q.round() + shift).clamp(0, (1 << BITS[scheme.kind]) - 1).to(torch.uint8), scheme.kind)
    return QuantizedWeight(
        scheme.kind, K, data, scale.T.contiguous(), block=(rows, columns), activations=scheme.activations,
        zeros=None if zeros is None else zeros.T.contiguous().to(torch.int16),
        perm=perm.int() if scheme.order else None,
        input_scale=torch.tensor([scheme.input_scale]) if scheme.input_scale else None,
    )  # fmt: skip


def quantized(model: nn.Module, name: str) -> nn.Module:
    """The same object with its linear layers quantized, all but the head and routers."""
    scheme = SCHEMES[name]
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            weight, bias = quantize(layer.weight.data, scheme), layer.bias
            model.set_submodule(path, QuantLinear.of(weight, bias, AsIs(scheme)).to(layer.weight.device))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers of the same weights."""
    model = copy.deepcopy(model)
    dtype = model.get_input_embeddings().weight.dtype
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.dequantize(dtype))
            plain.bias = layer.bias
            model.set_submodule(path, plain)
    return model
