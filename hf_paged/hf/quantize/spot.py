"""Quantization on the spot: every linear layer of a loaded model, rounded to nearest."""

from __future__ import annotations

from torch import nn

from ...base.errors import InvalidArgument
from ...quant.linear import QuantLinear
from ...quant.rounding import Scheme, round_to_nearest
from ..quantizers import mark_quantized
from .stored import as_gptq
from .targets import LARGEST_GROUP, find_targets, group_size_for, naming, replace, weight_of

KINDS = ("int4", "int8")


def quantize_on_the_spot(model: nn.Module, kind: str) -> None:
    """Put quantized layers in place of the linear layers inside `model`'s decoder layers, and let go of their weights.

    One layer after another: besides the model there is never more than one of them. What is saved then is a GPTQ
    checkpoint. A model whose layers are of this kind already stays as it is.

    Args:
        kind: "int4": groups of 128 input features, or as many of 64, 32 or 16 as divide those of every layer, share a
            scale. "int8": a row has one.

    Raises:
        InvalidArgument: `kind` is none of those; the model is quantized otherwise, has adapters, or is being trained.
        UnsupportedModel: the model has no linear layer to quantize.
    """
    check_kind(kind)
    if _kinds(model) == {kind}:
        return
    targets = find_targets(model)
    group_size = group_size_for(targets, LARGEST_GROUP) if kind == "int4" else -1
    scheme = Scheme(4 if kind == "int4" else 8, group_size, zero_from=1)
    stored = as_gptq(scheme, list(targets.kept))
    for name in list(targets.linears):
        with naming(name):
            replace(model, name, round_to_nearest(weight_of(targets.linears.pop(name)), scheme), stored.format)
    mark_quantized(model, stored.config)


def check_kind(kind: str | None) -> None:
    """Raises InvalidArgument unless `kind` is None or one of KINDS."""
    if kind is not None and kind not in KINDS:
        raise InvalidArgument(f"quantization must be one of {', '.join(KINDS)}, got {kind!r}")


def _kinds(model: nn.Module) -> set[str]:
    return {module.quantized.kind for module in model.modules() if isinstance(module, QuantLinear)}
