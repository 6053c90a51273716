"""What an adapter does to the layers of a model, read off PEFT's own modules: terms that kernels add, or why there are none.

    LoRA        y + s B A x                                     rsLoRA differs in s
    DoRA        g (y - b) + b + g s B A x                       g = m / |W + s B A| by row
    lora_bias   y + s B A x + s c
    bias        y + (b' - b)                                    the adapter's own bias for the layer's
    saved       W' x + b'                                       a layer of modules_to_save in place of the model's
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_paged_kernels.lora import Terms

from ...base.errors import InvalidArgument
from ...quant.linear import QuantLinear
from ..peft import tuner_of
from ..swap import Swapped
from ..watch import version_of
from .loading import innermost

LINEAR = (nn.Linear, QuantLinear, Conv1D)


@dataclass(eq=False)
class Target:
    """A layer that an adapter changes.

    Attributes:
        name: of the layer in the model.
        layer: the model's own.
        adapter: what PEFT calls it.
        module: PEFT's module around the layer in its own model; None where only a bias is the adapter's own.
        bias: the adapter's own bias for the layer; None for the layer's.
        saved: the layer that takes its place; then there are no terms.
    """

    name: str
    layer: nn.Module
    adapter: str
    module: nn.Module | None = None
    bias: Tensor | None = None
    saved: nn.Module | None = None

    @property
    def follows(self) -> bool:
        """Whether `terms` depends on the model's own weights."""
        return self.bias is not None or self.module is not None and self._magnitude is not None

    @property
    def looks_up(self) -> bool:
        return isinstance(self.layer, nn.Embedding)

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs); of an embedding (rows, columns)."""
        layer = self.layer
        if self.looks_up:
            return layer.num_embeddings, layer.embedding_dim
        return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)

    @torch.no_grad()
    def terms(self, dtype: torch.dtype, device: torch.device) -> Terms:
        """New tensors of `dtype` on `device`."""
        A = B = scale = shift = None
        if self.module is not None:
            A, B, shift = self._embedding_product() if self.looks_up else self._product()
            if self._magnitude is not None:
                scale = self._magnitude / self._norms(A, B)
                B = scale * B
                shift = None if shift is None else scale * shift
        if self.bias is not None or scale is not None:
            own = self._layer_bias()
            bias = own if self.bias is None else self.bias.float()
            if bias is not None:
                change = bias - (own if scale is None else scale * own)
                shift = change if shift is None else shift + change
        parts = (A, B, scale, shift)
        return Terms(*(None if part is None else part.to(device, dtype, copy=True).contiguous() for part in parts))

    def _product(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(A [r, K], s B transposed [r, N], s times the bias of B) in fp32."""
        module, name = self.module, self.adapter
        scaling, lora_B = module.scaling[name], module.lora_B[name]
        shift = None if lora_B.bias is None else scaling * lora_B.bias.float()
        return module.lora_A[name].weight.float(), scaling * lora_B.weight.float().T, shift

    def _embedding_product(self) -> tuple[Tensor, Tensor, None]:
        module, name = self.module, self.adapter
        scaling = module.scaling[name] * float(getattr(self.layer, "embed_scale", 1.0))
        return module.lora_embedding_A[name].float().T, scaling * module.lora_embedding_B[name].float().T, None

    @property
    def _magnitude(self) -> Tensor | None:
        vectors = getattr(self.module, "lora_magnitude_vector", {})
        return vectors[self.adapter].weight.float() if self.adapter in vectors else None

    def _norms(self, A: Tensor, B: Tensor) -> Tensor:
        """|W + s B A| of every output's row [N]."""
        weight = self.layer.weight.float()
        weight = weight.T if isinstance(self.layer, Conv1D) else weight
        return torch.linalg.norm(weight + (B.T @ A).to(weight.device), dim=1).to(A.device)

    def _layer_bias(self) -> Tensor | None:
        bias = self.layer.bias
        return None if bias is None else bias.float()


def targets_of(wrapped, name: str, model: nn.Module, before: dict | None) -> tuple[list[Target], str | None]:
    """(what the adapter `name` of the PeftModel `wrapped` changes in `model`, why that is not all it does).

    Args:
        before: the parameters of the wrapped model's own layers before the adapter was loaded, by name; None for a model
            of the caller's.

    Raises InvalidArgument: its layers are not those of `model`.
    """
    layers = dict(_own_layers(model))
    base = wrapped.get_base_model()
    targets: dict[str, Target] = {}
    reason = None
    for path, module in base.named_modules():
        if not concerns(module, name):
            continue
        layer = layers.get(path)
        if layer is None:
            raise InvalidArgument(f"adapter {name!r} is for another model: this one has no {path}")
        target, why = _target(path, module, layer, name)
        if target is None:
            reason = reason or why
        else:
            _check_sizes(target, name)
            targets[path] = target
    for path, bias in _own_biases(base, name, layers, before, wrapped.peft_config[name]):
        if not isinstance(layers[path], LINEAR):
            reason = reason or f"it has a bias of its own for {path}"
        else:
            targets.setdefault(path, Target(path, layers[path], name)).bias = bias
    if not targets and reason is None:
        raise InvalidArgument(f"adapter {name!r}: the model has no adapter of that name")
    return list(targets.values()), reason


def _own_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the model's own modules, as if nothing was wrapped around them."""
    for path, module in model.named_modules():
        parts = path.split(".")
        if "base_layer" not in parts and "original_module" not in parts and "modules_to_save" not in parts:
            yield path, innermost(module)


def concerns(module: nn.Module, name: str) -> bool:
    """Whether `module` is PEFT's, around a layer that the adapter `name` changes."""
    names = getattr(module, "adapter_layer_names", None)
    if names is None or not (names or getattr(module, "_adapters", None)):
        return False
    return any(name in (getattr(module, attribute, None) or {}) for attribute in names)


def _target(path: str, module: nn.Module, layer: nn.Module, name: str) -> tuple[Target | None, str | None]:
    """(the target, None), or (None, why there are no terms for it)."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils.other import ModulesToSaveWrapper

    kind, what = type(module), f"{path} has PEFT's {tuner_of(module) or type(module).__name__}"
    if kind is ModulesToSaveWrapper:
        saved = module.modules_to_save[name]
        own = saved._hf_paged_base if isinstance(saved, Swapped) else type(saved)
        if isinstance(layer, (nn.Linear, nn.Embedding)) and own in (nn.Linear, nn.Embedding):
            return Target(path, layer, name, saved=saved), None
        return None, f"{path} has a {type(saved).__name__} of its own"
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return None, f"{path} has LoRA's {type(variant).__name__}"
    if kind is lora.Embedding and variant is None and isinstance(layer, nn.Embedding) and layer.max_norm is None:
        return Target(path, layer, name, module=module), None
    known = kind is lora.Linear or kind.__name__ == "LoraQuantLinear"
    if known and isinstance(layer, LINEAR) and (variant is None or not isinstance(layer, QuantLinear)):
        return Target(path, layer, name, module=module), None
    return None, what


def _check_sizes(target: Target, name: str) -> None:
    """Raise InvalidArgument unless what the adapter has for a layer is of the layer's size."""
    rows, columns = target.sizes
    if target.saved is not None:
        found = tuple(target.saved.weight.shape)
        right = (rows, columns) if target.looks_up else (columns, rows)
    elif target.looks_up:
        found = target.module.lora_embedding_A[name].shape[1], target.module.lora_embedding_B[name].shape[0]
        right = rows, columns
    else:
        found = target.module.lora_A[name].weight.shape[1], target.module.lora_B[name].weight.shape[0]
        right = rows, columns
    if tuple(found) != right:
        raise InvalidArgument(
            f"adapter {name!r} is for another model: its {target.name} is {list(found)}, the model's {list(right)}"
        )


def _own_biases(base: nn.Module, name: str, layers: dict, before: dict | None, config) -> Iterator[tuple[str, Tensor]]:
    """(layer, bias) for every layer's bias that came with the adapter, and is not the model's.

    Raises InvalidArgument if other weights of the model came with it.
    """
    if before is None and getattr(config, "bias", "none") == "none":
        return
    for path, module in base.named_modules():
        parts = path.split(".")
        plain = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        own = layers.get(plain)
        if own is None or "modules_to_save" in parts or innermost(module) is not module:
            continue
        for key, parameter in module._parameters.items():
            mine = own._parameters.get(key)
            if parameter is None or mine is None or parameter is mine:
                continue
            if before is not None and parameter is before.get(f"{plain}.{key}"):
                continue
            if parameter.shape != mine.shape or not torch.equal(parameter.to(mine.device), mine):
                if key != "bias":
                    raise InvalidArgument(f"adapter {name!r} brings other weights of the model itself: {plain}.{key}")
                yield plain, parameter


def state_of(module: nn.Module, name: str) -> tuple:
    """What one of PEFT's modules does for an adapter: unequal whenever it has changed."""
    found: list[Tensor] = []
    for attribute in module.adapter_layer_names:
        held = getattr(module, attribute, None) or {}
        if name in held:
            part = held[name]
            found += [part] if isinstance(part, Tensor) else part.parameters()
    scaling = getattr(module, "scaling", None)
    scaling = scaling.get(name) if isinstance(scaling, dict) else None
    return scaling, *((id(tensor), tensor.data_ptr(), version_of(tensor)) for tensor in found)
