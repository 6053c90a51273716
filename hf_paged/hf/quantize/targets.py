"""Which linear layers of a model are quantized, and why the others are not."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_paged_kernels.quantized import QuantizedWeight

from ...base.errors import InvalidArgument, UnsupportedModel
from ...quant.formats.base import Format
from ...quant.linear import QuantLinear
from ...quant.packed import Packed
from ..experts import separable, separate
from ..spec import decoder_layers, text_config

MULTIPLE = 16  # of rows and columns: the smallest group, and what packs into whole words
MULTIPLE_OF_3_BITS = 32
LARGEST_GROUP = 128  # input features that share a scale, by default


@dataclass
class Targets:
    """Linear layers inside the decoder layers, by name.

    Attributes:
        linears: those to quantize.
        experts: stacked experts to quantize, with what checkpoints call the projections of one.
        kept: those that stay as they are -> why.
    """

    linears: dict[str, nn.Module] = field(default_factory=dict)
    experts: dict[str, tuple[nn.Module, tuple]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of those to quantize; a checkpoint has experts as linear layers."""
        return sorted({"Conv1D" if isinstance(module, Conv1D) else "Linear" for module in self.linears.values()} or {"Linear"})

    @property
    def input_sizes(self) -> set[int]:
        """Numbers of input features."""
        sizes = {weight_of(module).shape[1] for module in self.linears.values()}
        return sizes | {side.shape[2] for module, _ in self.experts.values() for side in _sides(module)}

    def take_experts(self, model: nn.Module, prefix: str, make: Callable[[str, Tensor], nn.Module]) -> list[str]:
        """Put layers, which `make` gives for a name and a weight, in place of the experts below `prefix`.

        Returns the experts' names; `stack_experts` is what comes in the end.
        """
        names = [name for name in self.experts if name.startswith(prefix)]
        for name in names:
            model.set_submodule(name, separate(name, *self.experts.pop(name), make))
        return names


def find_targets(model: nn.Module, *, multiple: int = MULTIPLE) -> Targets:
    """Every linear layer of a decoder layer that calls it as a layer. The head and embeddings are none of them.

    Args:
        multiple: what rows and columns must be multiples of.

    Raises:
        InvalidArgument: the model is quantized already, has adapters, or is in training mode.
        UnsupportedModel: it has no such layer.
    """
    check_quantizable(model)
    targets = sort_linears(model, multiple)
    if not targets.linears and not targets.experts:
        reasons = "; ".join(dict.fromkeys(targets.kept.values())) or "its decoder layers have none"
        raise UnsupportedModel(f"model: {type(model).__name__} has no linear layer to quantize: {reasons}")
    return targets


def sort_linears(model: nn.Module, multiple: int = MULTIPLE) -> Targets:
    """As `find_targets`, of any model: those that are quantized already do not count."""
    targets = Targets()
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    router_sizes = _numbers_of_experts(model)
    for prefix, layer in decoder_layers(model).items():
        for name, module, parents in _with_parents(layer, prefix):
            if not is_linear(module):
                continue
            reason = _why_kept(module, name, parents, owners, router_sizes, multiple)
            if reason is None:
                targets.linears[name] = module
            else:
                targets.kept[name] = reason
    for name, (module, names) in separable(model).items():
        if reason := _why_experts_kept(module, names, multiple):
            targets.kept[name] = reason
        else:
            targets.experts[name] = module, names
    return targets


def check_quantizable(model: nn.Module) -> None:
    """Raises InvalidArgument, beginning with "quantization", for a model in the wrong state."""
    name = type(model).__name__
    method = getattr(model, "quantization_method", None) or getattr(model.config, "quantization_config", None)
    if method is not None or _quantized(model):
        raise InvalidArgument(f"quantization: this {name} is quantized already ({_method(method)})")
    if any(type(module).__module__.startswith("peft.tuners") for module in model.modules()):
        raise InvalidArgument(
            f"quantization: this {name} has PEFT adapters on it; quantize it first and add them then, or merge them into "
            "the weights (merge_and_unload)"
        )
    if model.training:
        raise InvalidArgument(f"quantization: this {name} is in training mode; call model.eval() first")
    if not all(parameter.dtype.is_floating_point for parameter in model.parameters()):
        raise InvalidArgument(f"quantization: this {name} has parameters that are not floating-point numbers")


def weight_of(module: nn.Module) -> Tensor:
    """W [N, K] of a linear layer; a view."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def group_size_for(targets: Targets, most: int) -> int:
    """The largest group size up to `most` that divides the input features of every target.

    A checkpoint has one group size. Raises InvalidArgument if `most` is no group size.
    """
    size = most
    while any(K % size for K in targets.input_sizes):
        size //= 2
    return size


def summary(kept: dict[str, str]) -> dict[str, str]:
    """`kept` with layers of the same name in several decoder layers as one entry, with a star for the number."""
    return {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in kept.items()}


def left_plain(model: nn.Module) -> dict[str, str]:
    """Linear layers of a quantized model's decoder layers that are not quantized -> why. Empty for other models."""
    if not _quantized(model):
        return {}
    targets = sort_linears(model)
    kept = targets.kept | dict.fromkeys([*targets.linears, *targets.experts], "the checkpoint leaves it as it is")
    return summary(kept)


def _quantized(model: nn.Module) -> list[Packed]:
    """Of experts, each side counts as a layer."""
    return [module for module in model.modules() if isinstance(module, Packed) and module.is_packed]


def replace(model: nn.Module, name: str, weight: QuantizedWeight, format: Format) -> None:
    """Put a layer of this weight, and of its own bias and hooks, where the model has the linear layer `name`."""
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    before = getattr(parent, leaf)
    layer = QuantLinear.of(weight, before.bias, format).train(before.training)
    layer.__dict__.update({key: hooks for key, hooks in before.__dict__.items() if "_hooks" in key})
    setattr(parent, leaf, layer)


def stack_experts(model: nn.Module, names: list[str]) -> None:
    """Stack experts whose layers are all quantized."""
    for name in names:
        model.set_submodule(name, model.get_submodule(name).stacked())


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Scope in which an InvalidArgument gets the name of the layer it is about."""
    try:
        yield
    except InvalidArgument as error:
        raise type(error)(f"{layer}: {error}") from error


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer on a plain weight."""
    return isinstance(module, nn.Linear | Conv1D)


def _with_parents(layer: nn.Module, prefix: str):
    """(name, module, the modules above it) below `layer`, each module once."""
    seen = set()
    stack = [(prefix, layer, ())]
    while stack:
        name, module, parents = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module, parents
        children = [(f"{name}.{leaf}", child, (*parents, module)) for leaf, child in module.named_children()]
        stack.extend(reversed(children))


def _why_kept(module, name: str, parents: tuple, owners: Counter, router_sizes: set[int], multiple: int) -> str | None:
    N, K = weight_of(module).shape
    kind = getattr(module, "_hf_paged_base", type(module))  # in a patched model its class is swapped
    if kind not in (nn.Linear, Conv1D) and not _computes_linear(module):
        return f"{kind.__name__} computes more than a linear layer"
    if "forward" in module.__dict__:
        return "its forward was replaced on the module"
    if owners[id(module.weight)] > 1:
        return "its weight is tied to another module's"
    if N in router_sizes and not any("attention" in type(parent).__name__.lower() for parent in parents):
        return "it is a router"
    if N % multiple or K % multiple:
        return f"{N} x {K} are no multiples of {multiple}"
    if _reads_weight(name.rpartition(".")[2], parents):
        return "other code reads its weight"
    return None


def _computes_linear(module: nn.Module) -> bool:
    """Whether a modeling file's subclass, such as Falcon's, computes just what nn.Linear does."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, module.in_features, generator=generator).to(module.weight)
    with torch.no_grad():
        actual, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
    return isinstance(actual, Tensor) and torch.allclose(actual, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def _why_experts_kept(module: nn.Module, names: tuple | None, multiple: int) -> str | None:
    if names is None:
        return f"experts of a {type(module).__name__} have no layers of their own in checkpoints"
    if any(size % multiple for side in _sides(module) for size in side.shape[1:]):
        return f"the experts' sizes are no multiples of {multiple}"
    return None


def _sides(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.gate_up_proj, module.down_proj


def _reads_weight(leaf: str, parents: tuple) -> bool:
    """Whether the code of a module above a layer mentions the layer's weight or bias."""
    return any(re.search(rf"\b{re.escape(leaf)}\.(weight|bias)\b", _source(type(parent))) for parent in parents) or (
        leaf == "kv_b_proj"  # hf/adapters/mla.py takes it apart
    )


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made on the spot
        return ""


def _numbers_of_experts(model: nn.Module) -> set[int]:
    settings = text_config(model).to_dict().items()
    return {value for name, value in settings if "experts" in name and "per_tok" not in name and isinstance(value, int) and value > 1}


def _method(method) -> str:
    method = getattr(method, "quant_method", method) or "hf_paged"
    return str(getattr(method, "value", method))
