"""GPTQ and AWQ on a whole model: decoder layer by decoder layer, each on what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...quant.awq import round_clipped, search_scales
from ...quant.formats.base import Format
from ...quant.gptq import Gptq, gptq
from ...quant.moments import Moments
from ...quant.rounding import Scheme
from .folds import Fold, FoldFinder
from .stream import LayerStream
from .targets import is_linear, naming, replace, weight_of

Progress = Callable[[str], None]  # called with a layer's name when that is done


def calibrate_gptq(
    model: nn.Module, stream: LayerStream, linears: dict[str, nn.Module], scheme: Scheme, options: Gptq, format: Format,
    done: Progress,
) -> None:  # fmt: skip
    """Replace `linears` by quantized layers. Also inside a decoder layer, inputs are those that quantized ones give."""
    for _ in range(len(stream.layers)):
        prefix = stream.name + "."
        mine = {name: module for name, module in linears.items() if name.startswith(prefix)}
        for group in stream.groups(mine):
            moments = stream.moments({group[0]: mine[group[0]]})[group[0]]
            for name in group:
                with naming(name):
                    replace(model, name, gptq(weight_of(mine[name]), moments, scheme, options), format)
                done(name)
        stream.advance()


def calibrate_awq(
    model: nn.Module, stream: LayerStream, linears: dict[str, nn.Module], scheme: Scheme, format: Format, done: Progress
) -> list[str]:
    """Replace `linears` by quantized layers whose inputs are scaled by what comes before them.

    Returns the names of those whose scales found no place; their ranges alone were searched.
    """
    finder, unscaled = FoldFinder(stream), []
    for _ in range(len(stream.layers)):
        readers = {f"{stream.name}.{name}": module for name, module in stream.layer.named_modules() if is_linear(module)}
        groups = [group for group in stream.groups(readers) if any(name in linears for name in group)]
        folds = finder.find(readers, groups)
        moments = stream.moments({group[0]: readers[group[0]] for group in groups})
        for group, fold in zip(groups, folds):
            if fold is None:
                unscaled += [name for name in group if name in linears]
            else:
                _scale(stream.layer, [readers[name] for name in group], fold, moments[group[0]], scheme)
        for group in groups:
            for name in [name for name in group if name in linears]:
                with naming(name):
                    replace(model, name, round_clipped(weight_of(linears[name]), moments[group[0]], scheme), format)
                done(name)
        stream.advance()
    return unscaled


def _scale(layer: nn.Module, readers: list[nn.Module], fold: Fold, moments: Moments, scheme: Scheme) -> None:
    """Search scales for what these layers read, and fold them in."""
    scales = search_scales([weight_of(module) for module in readers], moments, scheme, fold.shared)
    fold.apply(layer, readers, scales)
    moments.divide_(scales)
