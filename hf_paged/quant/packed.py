"""A module whose parameters are the tensors of a quantized weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.quantized import QuantizedWeight, same_layout, with_block


class Packed(nn.Module):
    """Holds a QuantizedWeight; its tensors are parameters under the names of its attributes. A `bias` may be beside it.

    Attributes:
        backend: whose kernels multiply.
    """

    backend = "auto"

    def __init__(self):
        super().__init__()
        self._weight: QuantizedWeight | None = None
        self._places: list[tuple[str, int]] = []  # of its tensors: (name, address)
        self._block = (1, 0)  # of the weight as it was packed
        self.register_parameter("bias", None)

    @property
    def is_packed(self) -> bool:
        return self._weight is not None

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in the kernels' layout. Its tensors are this module's parameters."""
        assert self._weight is not None, "pack_ comes first"
        mine = self._parameters
        if any(mine[name].data_ptr() != pointer for name, pointer in self._places):
            self._hold(self._weight.with_tensors({name: mine[name].data for name, _ in self._places}))
        return self._weight

    @quantized.setter
    def quantized(self, weight: QuantizedWeight) -> None:
        """Takes the same weight in other memory, say as a part of a joint one. The parameters remain the same objects."""
        for name, tensor in weight.tensors().items():
            self._parameters[name].data = tensor
        self._hold(weight)

    @property
    def stored_weight(self) -> QuantizedWeight:
        """The weight with as many scales as it was packed with."""
        return with_block(self.quantized, self._block)

    def _set(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _adopt(self, weight: QuantizedWeight) -> None:
        for name in list(self._parameters):
            if name != "bias":
                del self._parameters[name]
        for name, tensor in weight.tensors().items():
            self._set(name, tensor)
        self._block = weight.block
        self._hold(weight)

    def _hold(self, weight: QuantizedWeight) -> None:
        self._weight = weight
        self._places = [(name, tensor.data_ptr()) for name, tensor in weight.tensors().items()]

    def _take_values(self, weight: QuantizedWeight) -> None:
        with torch.no_grad():
            if same_layout(weight, self.quantized):
                for name, tensor in weight.tensors().items():
                    self._parameters[name].copy_(tensor)
            else:  # say, zero points where there were none
                device = self.quantized.device
                self._adopt(weight.with_tensors({name: tensor.to(device) for name, tensor in weight.tensors().items()}))

    def _apply(self, fn, recurse=True):
        """As ever for the bias; the weight goes to another device, but `half` and the like do not touch its types."""
        if self._weight is None:
            return super()._apply(fn, recurse)
        for name in self._weight.tensors():
            parameter = self._parameters[name]
            moved = fn(parameter.data)
            parameter.data = moved if moved.dtype == parameter.dtype else parameter.data.to(moved.device)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self


def product(x: Tensor, weight: QuantizedWeight, backend: str = "auto") -> Tensor:
    """x W^T, differentiable in x."""
    return _Product.apply(x, weight, backend)


class _Product(torch.autograd.Function):
    """x W^T, differentiable in x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: QuantizedWeight, backend: str) -> Tensor:
        ctx.weight = weight
        return fused.linear(x, weight, backend=backend)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.weight.dequantize(gradient.dtype), None, None

