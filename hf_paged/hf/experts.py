"""Experts of checkpoints that hold them quantized, one by one, in models that hold them stacked.

transformers merges the experts' weights while it loads them; its `WeightConverter`s name the tensors that it merges. It
cannot merge quantized ones, so `ExpertLayers` takes the module's place and is filled like any other module, packed and
stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from hf_paged_kernels import fused

from ..base.errors import UnsupportedOption
from ..quant.experts import ExpertLayers, Gating, QuantExperts
from ..quant.linear import QuantLinear
from .fusion.experts import activation_of, is_experts

_SIDES = ("gate_up_proj", "down_proj")
_LIMIT = 1e-5  # of what a kernel's activation may differ from the module's, in fp32


class QuantizedExperts:
    """Puts modules that can be filled in place of a model's stacked experts.

    Args:
        layers: the checkpoint's tensors, by layer and name.
        is_quantized: whether such tensors are those of a quantized layer.
        make: gives a layer, to be filled, for the linear layer of that name that would have been there.

    Raises:
        UnsupportedOption: the checkpoint has quantized experts of a kind that cannot be loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, dict[str, Tensor]],
        is_quantized: Callable[[dict[str, Tensor]], bool],
        make: Callable[[str, nn.Linear], QuantLinear],
    ):
        self._converters: list[WeightConverter] = []
        self._replaced: dict[str, nn.Module] = {}
        converters = _converters(model)
        quantized = [name for name, tensors in layers.items() if is_quantized(tensors)]
        plain = None
        for name, module in [(name, module) for name, module in model.named_modules() if is_experts(module)]:
            if not any(layer.startswith(f"{name}.") for layer in quantized):
                plain = name
                continue
            mine = [_converter(converters, name, side) for side in _SIDES]
            names = _names(mine, module)
            if names is None:
                raise UnsupportedOption(f"{name}: quantized experts of a {type(module).__name__} cannot be loaded")
            self._converters += mine
            self._replaced[name] = module
            model.set_submodule(name, _layers(name, module, *names, make))
        if plain and self._replaced:
            raise UnsupportedOption(
                f"{plain}: its experts are not quantized, those of {next(iter(self._replaced))} are"
            )

    def without_merging(self, conversions: list) -> list:
        """Conversions of names and weights, without those that would merge the tensors of these experts."""
        merging = [converter.target_patterns for converter in self._converters]
        return [entry for entry in conversions if entry.target_patterns not in merging]

    def owners(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """The layers of each module that holds experts, and every other layer for itself, in their order."""
        found: dict[str, list[str]] = {}
        for layer in layers:
            owner = next((name for name in self._replaced if layer.startswith(f"{name}.")), layer)
            found.setdefault(owner, []).append(layer)
        return found

    def stack(self, model: nn.Module, name: str) -> None:
        """Stack the layers of the module `name`, which have been packed, if it holds experts."""
        if name in self._replaced:
            model.set_submodule(name, model.get_submodule(name).stacked())


def separable(model: nn.Module) -> dict[str, tuple[nn.Module, tuple | None]]:
    """Stacked experts by name, with what a checkpoint calls the projections of one; None if they cannot be quantized."""
    converters = _converters(model)
    found = {}
    for name, module in model.named_modules():
        if is_experts(module):
            names = _names([_converter(converters, name, side) for side in _SIDES], module)
            found[name] = module, None if module.has_bias else names
    return found


def separate(name: str, module: nn.Module, names: tuple, make: Callable[[str, Tensor], nn.Module]) -> ExpertLayers:
    """What takes the place of stacked experts, which are used up; `make` gives an expert's layer of a name and a weight.

    Args:
        names: as `separable` gives them.
    """
    (first, (last,)), sides = names, (module.gate_up_proj.detach(), module.down_proj.detach())

    def weight_of(layer: str) -> Tensor:
        expert, projection = layer.removeprefix(f"{name}.").split(".")
        if projection == last:
            return sides[1][int(expert)]
        return sides[0][int(expert)].chunk(len(first))[first.index(projection)]

    return _layers(name, module, *names, lambda layer, _: make(layer, weight_of(layer)))


def dequantize_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the modules that transformers has for stacked experts back, with the dequantized weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantExperts | ExpertLayers):
            original = module.gating.apply.experts
            for side, weight in zip(_SIDES, module.dequantize(dtype)):
                setattr(original, side, nn.Parameter(weight))
            model.set_submodule(name, original)


class _Gate:
    """What experts do between their projections. `experts`: transformers' module, without its weights."""

    def __init__(self, experts: nn.Module):
        self.experts = experts

    def __call__(self, gate_up: Tensor) -> Tensor:
        return self.experts._apply_gate(gate_up)


def _converters(model: nn.Module) -> list[WeightConverter]:
    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]


def _names(converters: list[WeightConverter | None], module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What a checkpoint calls the projections of one expert of `module`, or None for experts of an unusual kind."""
    names = [converter and _stored_names(converter) for converter in converters]
    if None in names or module.is_transposed or not module.has_gate or _has_post_norm(module):
        return None
    return tuple(names)


def _converter(converters: list[WeightConverter], name: str, side: str) -> WeightConverter | None:
    """What merges the weights of one side of the experts called `name`."""
    for converter in converters:
        path, _, last = converter.target_patterns[0].rpartition(".")
        if len(converter.target_patterns) == 1 and last == side and f".{name}".endswith(f".{path.strip('.')}"):
            return converter
    return None


def _stored_names(converter: WeightConverter) -> tuple[str, ...] | None:
    """What a checkpoint calls the layers that it merges: ("gate_proj", "up_proj"); None if it does more with them."""
    names = []
    for source in converter.source_patterns:
        path, _, last = source.rpartition(".")
        names.append(path.rpartition("*.")[2] if last == "weight" and "*." in path else None)
    operations = [type(operation) for operation in converter.operations]
    expected = [MergeModulelist, Concatenate] if len(names) > 1 else [MergeModulelist]
    return None if None in names or operations != expected else tuple(names)


def _has_post_norm(module: nn.Module) -> bool:
    return getattr(module, "has_post_expert_norm", False)


def _layers(name: str, module: nn.Module, first: tuple[str, ...], last: tuple[str], make: Callable) -> ExpertLayers:
    (count, N, H), I = module.gate_up_proj.shape, module.down_proj.shape[2]  # noqa: E741
    shapes = {**dict.fromkeys(first, (H, N // len(first))), last[0]: (I, H)}
    plain = {
        layer: nn.Linear(*sizes, bias=False, device="meta", dtype=module.down_proj.dtype)
        for layer, sizes in shapes.items()
    }
    experts = [
        {layer: make(f"{name}.{expert}.{layer}", linear) for layer, linear in plain.items()} for expert in range(count)
    ]
    module._parameters.clear()
    return ExpertLayers(experts, Gating(first, last[0], _Gate(module), _kernel_of(module, N)))


def _kernel_of(module: nn.Module, width: int) -> str | None:
    """The name of the kernel that does what lies between an expert's projections."""
    name = activation_of(module)
    if not isinstance(name, str):
        return None
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0), device="cpu") * 4  # not "meta"
    difference = module._apply_gate(rows) - fused.act_and_mul(rows, name, backend="reference")
    return name if difference.abs().max() <= _LIMIT * rows.abs().max() ** 2 else None
