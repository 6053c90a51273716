"""A linear layer on a quantized weight, as a module of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.quantized import QuantizedWeight

from ..base.errors import InvalidArgument, UnsupportedOption
from .cuts import Cut, pack_cut
from .formats.base import Format
from .packed import Packed, product


class QuantLinear(Packed):
    """y = x W^T + b with a quantized W [N, K].

    A new layer has parameters of the checkpoint's names and shapes, for a loader to fill. `pack_` brings them into the
    kernels' layout. From then on `quantized` is the weight, its tensors are parameters under the names of its attributes,
    and the state dict still has the checkpoint's tensors: it is saved and loaded in the format it came in.

    The weight is not trained. The gradient of the input is that of the dequantized layer, so adapters can be.

    Args:
        format: what the checkpoint stores for a layer of these sizes.
        device: of the parameters, by default that of nothing yet ("meta").
        dtype: of the bias.
        like: the tensors that the checkpoint has, of any device: the parameters are these, in these types.

    Attributes:
        cut: which part of the layer it is, on one of several ranks; None: all of it. Set before `pack_`, after which its
            sizes are the part's. A part is not saved.
        takes: the input features that the weight takes, where it needs them in another order; see `taken`.

    Raises:
        InvalidArgument: the format has no layer of these sizes, or `like` is not what it has of one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
        like: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.cut: Cut | None = None
        self.register_buffer("takes", None, persistent=False)
        if like is not None:
            format.check(like, out_features, in_features)
        for name, stored in format.stored(out_features, in_features).items():
            if like is None or name in like:
                found = stored.dtypes[0] if like is None else like[name].dtype
                self._set(name, torch.empty(stored.shape, dtype=found, device=device))
        if bias:
            self._set("bias", torch.empty(out_features, device=device, dtype=dtype))

    @classmethod
    def of(cls, weight: QuantizedWeight, bias: Tensor | None, format: Format) -> QuantLinear:
        """The layer of a weight that is quantized already; `format` is what it will be saved in."""
        N, K = weight.shape
        layer = cls(K, N, False, format)
        layer._adopt(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def pack_(self) -> None:
        """Bring what was loaded into the kernels' layout and let go of it.

        Raises InvalidArgument, beginning with the tensor's name, if one is missing, or has another shape or type than the
        format says, or impossible values.
        """
        loaded = {name: tensor for name, tensor in self._parameters.items() if name != "bias"}
        tensors = {name: tensor.data for name, tensor in loaded.items() if not tensor.is_meta}
        if self.cut is None:
            return self._adopt(self._checked_pack(tensors))
        weight, self.takes = pack_cut(self.format, tensors, self.out_features, self.in_features, self.cut)
        self.out_features, self.in_features = self.cut.local_sizes(self.out_features, self.in_features)
        self._adopt(weight)

    def taken(self, input: Tensor) -> Tensor:
        """Of input [..., in_features] what the weight is multiplied with."""
        if self.takes is None:
            return input
        return nn.functional.pad(input, (0, 1)).index_select(-1, self.takes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K]."""
        return self.quantized.dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        input = self.taken(input)
        if not (torch.is_grad_enabled() and (input.requires_grad or self.bias is not None and self.bias.requires_grad)):
            return fused.linear(input, self.quantized, self.bias, backend=self.backend)
        y = product(input, self.quantized, self.backend)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.format}"

    def _checked_pack(self, tensors: dict[str, Tensor]) -> QuantizedWeight:
        self.format.check(tensors, self.out_features, self.in_features)
        return self.format.pack(tensors, self.out_features, self.in_features)

    def _check_whole(self, what: str) -> None:
        if self.cut is not None:
            raise UnsupportedOption(f"{what}: this rank has a part of a quantized layer, which is neither saved nor replaced")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._weight is None:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        self._check_whole("state_dict")
        for name, tensor in self.format.unpack(self.stored_weight).items():
            destination[prefix + name] = tensor.contiguous()  # of joined layers, scales are parts of rows
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self._weight is None:
            return super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self._check_whole("load_state_dict")
        names = self.format.stored(self.out_features, self.in_features)
        bias = {"bias"} if self.bias is not None else set()
        tensors = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if strict:
            unexpected += [
                key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in {*names, *bias}
            ]
            required = bias if tensors else bias | {name for name, stored in names.items() if not stored.optional}
            missing += [prefix + name for name in required if prefix + name not in state_dict]
        try:  # without any, it is a part of a model's state, such as its adapters
            weight = self._checked_pack(tensors) if tensors else None
        except InvalidArgument as error:
            errors.append(f"{prefix}{error}")
            return
        if weight is not None:
            self._take_values(weight)
        if self.bias is not None and prefix + "bias" in state_dict:
            with torch.no_grad():
                self.bias.copy_(state_dict[prefix + "bias"])
