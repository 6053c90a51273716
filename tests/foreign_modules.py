"""Quantized layers built the way other packages build theirs, each with a forward of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODES = torch.tensor([-1.0, -0.7, -0.53, -0.4, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])


class Packed(nn.Parameter):
    """A parameter of a type of its own, with ordinary memory."""


class PackedLinear(nn.Linear):
    """As bitsandbytes: an nn.Linear whose weight is one column of bytes, two values in each; scales are no parameters."""

    calls = 0

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        rows = layer.weight.detach().float()
        new.scale = rows.abs().amax(1, keepdim=True)
        codes = (rows[..., None] / new.scale[..., None] - CODES).abs().argmin(-1).to(torch.uint8).flatten()
        new.weight = Packed((codes[::2] << 4 | codes[1::2])[:, None], requires_grad=False)
        new.bias = layer.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        PackedLinear.calls += 1
        codes = torch.stack((self.weight[:, 0] >> 4, self.weight[:, 0] & 15), dim=1).long()
        weight = CODES[codes].view(self.out_features, self.in_features) * self.scale
        return F.linear(input, weight.to(input.dtype), self.bias)


class ScaledTensor(Tensor):
    """As torchao: a tensor of a type of its own that wraps others and has no memory; ordinary layers hold it."""

    calls = 0

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor, dtype: torch.dtype):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, tensors, dtype, size, stride):
        return cls(tensors["values"], tensors["scale"], dtype)

    def dequantize(self) -> Tensor:
        return (self.values.float() * self.scale).to(self.dtype)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            ScaledTensor.calls += 1
            input, weight, *bias = args
            return F.linear(input, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"{function} of a ScaledTensor")


def scaled(layer: nn.Linear) -> nn.Linear:
    rows = layer.weight.detach().float()
    scale = rows.abs().amax(1, keepdim=True) / 127
    layer.weight = nn.Parameter(
        ScaledTensor((rows / scale).round().to(torch.int8), scale, layer.weight.dtype), requires_grad=False
    )
    return layer


class QWeightLinear(nn.Module):
    """As gptqmodel, AQLM and HQQ: no nn.Linear, no `weight`, sizes under names of its own, integers in buffers."""

    calls = 0

    @classmethod
    def of(cls, layer: nn.Linear) -> QWeightLinear:
        new = cls()
        new.infeatures, new.outfeatures = layer.in_features, layer.out_features
        rows = layer.weight.detach().float()
        scales = rows.abs().amax(1) / 7
        words = (rows / scales[:, None]).round().to(torch.int32) + 8
        new.register_buffer("qweight", sum(words[:, field::8] << 4 * field for field in range(8)))
        new.register_buffer("scales", scales)
        new.register_parameter("bias", layer.bias)
        return new

    def forward(self, x: Tensor) -> Tensor:
        QWeightLinear.calls += 1
        values = torch.stack([self.qweight >> 4 * field & 15 for field in range(8)], dim=-1).flatten(1) - 8
        return F.linear(x, (values * self.scales[:, None]).to(x.dtype), self.bias)


class Float8Linear(nn.Linear):
    """As transformers' FP8Linear: an nn.Linear whose weight is 8-bit floats, its scales a parameter beside it."""

    calls = 0

    @classmethod
    def of(cls, layer: nn.Linear) -> Float8Linear:
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        scale = layer.weight.detach().float().abs().max() / 448
        new.weight_scale_inv = nn.Parameter(scale)
        new.weight = nn.Parameter((layer.weight.detach().float() / scale).to(torch.float8_e4m3fn))
        new.bias = layer.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        Float8Linear.calls += 1
        return F.linear(input, (self.weight.float() * self.weight_scale_inv).to(input.dtype), self.bias)


class OutlierLinear(nn.Linear):
    """As bitsandbytes' LLM.int8(): rows are rounded to 8 bits but for columns where any row of the batch is large."""

    @classmethod
    def of(cls, layer: nn.Linear) -> OutlierLinear:
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        rows = input.flatten(0, -2)
        large = rows.abs().amax(0) > 2 * rows.abs().mean()
        scale = rows.masked_fill(large, 0).abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
        rows = torch.where(large, rows, (rows / scale).round() * scale)
        return F.linear(rows.view_as(input), self.weight, self.bias)


class PackedEmbedding(nn.Module):
    """As transformers' GGUF embedding: no nn.Embedding, a table of bytes."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.scale = nn.Parameter(table.detach().float().abs().amax(1, keepdim=True) / 127, requires_grad=False)
        codes = (table.detach().float() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(torch.cat((codes.view(torch.uint8), codes.view(torch.uint8)), 1), requires_grad=False)
        self.dtype = table.dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.weight[input_ids][..., : self.embedding_dim].contiguous().view(torch.int8)
        return (rows.float() * self.scale[input_ids]).to(self.dtype)


KINDS = {
    "packed bytes": (PackedLinear.of, PackedLinear),
    "wrapper tensor": (scaled, ScaledTensor),
    "qweight": (QWeightLinear.of, QWeightLinear),
    "float8": (Float8Linear.of, Float8Linear),
}


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Replace all linear layers but the head. `calls` of KINDS[kind][1] counts their forwards from now on."""
    make, counter = KINDS[kind]
    replace_linears(model, make)
    counter.calls = 0
    return model


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(module, name, make(child))
    return model


def linears_of(model: nn.Module) -> int:
    head = model.get_output_embeddings()
    return sum(isinstance(module, nn.Linear) and module is not head for module in model.modules())


