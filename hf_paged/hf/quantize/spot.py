"""Quantization on the spot: every linear layer of a loaded model, rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hf_paged_kernels.quantized import QuantizedWeight

from ...base.errors import InvalidArgument
from ...quant.formats.base import Format
from ...quant.linear import QuantLinear
from ...quant.packed import Packed
from ...quant.rounding import Scheme, round_to_fp8, round_to_nearest
from ..quantizers import mark_quantized
from .stored import Stored, as_fp8, as_gptq
from .targets import LARGEST_GROUP, Targets, find_targets, group_size_for, naming, replace, stack_experts, weight_of

KINDS = ("int4", "int8", "fp8")


def quantize_on_the_spot(model: nn.Module, kind: str) -> None:
    """Put quantized layers in place of the linear layers inside `model`'s decoder layers, and let go of their weights.

    One layer after another: besides the model there is never more than one of them. What is saved then is a GPTQ
    checkpoint, of fp8 one of compressed-tensors. A model whose layers are of this kind already stays as it is.

    Args:
        kind: "int4": groups of 128 input features, or as many of 64, 32 or 16 as divide those of every layer, share a
            scale. "int8": a row has one. "fp8": so it has, in e4m3, and inputs are rounded to fp8, too, on GPUs.

    Raises:
        InvalidArgument: `kind` is none of those; the model is quantized otherwise, has adapters, or is being trained.
        UnsupportedModel: the model has no linear layer to quantize.
    """
    check_kind(kind)
    if _kinds(model) == {kind}:
        return
    targets = find_targets(model)
    stored, rounded = _way(kind, targets)
    round_layers(model, targets, rounded, stored.format)
    mark_quantized(model, stored.config)


def round_layers(
    model: nn.Module, targets: Targets, rounded: Callable[[Tensor], QuantizedWeight], format: Format,
    done: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Put quantized layers in place of `targets`, which are used up; their weights are what `rounded` makes of them."""
    for name in list(targets.linears):
        with naming(name):
            replace(model, name, rounded(weight_of(targets.linears.pop(name))), format)
        done(name)
    for name in list(targets.experts):
        stack_experts(model, targets.take_experts(model, name, lambda _, weight: QuantLinear.of(rounded(weight), None, format)))
        done(name)


def _way(kind: str, targets: Targets) -> tuple[Stored, Callable[[Tensor], QuantizedWeight]]:
    """What layers are stored as, and what rounds a weight."""
    if kind == "fp8":
        return as_fp8(list(targets.kept), targets.classes), round_to_fp8
    group_size = group_size_for(targets, LARGEST_GROUP) if kind == "int4" else -1
    scheme = Scheme(4 if kind == "int4" else 8, group_size, zero_from=1)
    return as_gptq(scheme, list(targets.kept)), lambda weight: round_to_nearest(weight, scheme)


def check_kind(kind: str | None) -> None:
    """Raises InvalidArgument unless `kind` is None or one of KINDS."""
    if kind is not None and kind not in KINDS:
        raise InvalidArgument(f"quantization must be one of {', '.join(KINDS)}, got {kind!r}")


def _kinds(model: nn.Module) -> set[str]:
    return {module.quantized.kind for module in model.modules() if isinstance(module, Packed) and module.is_packed}
