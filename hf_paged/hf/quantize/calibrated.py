"""GPTQ and AWQ on a whole model: decoder layer by decoder layer, each on what the quantized ones before it give."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from ...quant.awq import round_clipped, search_scales
from ...quant.formats.base import Format
from ...quant.gptq import Gptq, gptq
from ...quant.moments import Moments
from ...quant.rounding import Scheme
from .folds import Fold, FoldFinder
from .stream import LayerStream
from .targets import Targets, is_linear, naming, replace, stack_experts, weight_of

Progress = Callable[[str], None]  # called with a layer's name when that is done


def calibrate_gptq(
    model: nn.Module, stream: LayerStream, targets: Targets, scheme: Scheme, options: Gptq, format: Format, done: Progress
) -> None:
    """Replace `targets` by quantized layers. Also inside a decoder layer, inputs are those that quantized ones give."""
    for _ in range(len(stream.layers)):
        experts, mine = _open(model, stream, targets)
        for groups in _levels(stream.groups(mine)):
            found = stream.moments({group[0]: mine[group[0]] for group in groups})
            for group in groups:
                moments = found.pop(group[0])
                for name in group:
                    with naming(name):
                        replace(model, name, gptq(weight_of(mine.pop(name)), moments, scheme, options), format)
                    done(name)
        stack_experts(model, experts)
        stream.advance()


def calibrate_awq(
    model: nn.Module, stream: LayerStream, targets: Targets, scheme: Scheme, format: Format, done: Progress
) -> list[str]:
    """Replace `targets` by quantized layers whose inputs are scaled by what comes before them.

    Returns the names of those whose scales found no place; their ranges alone were searched.
    """
    finder, unscaled = FoldFinder(stream), []
    for _ in range(len(stream.layers)):
        experts, linears = _open(model, stream, targets)
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
        stack_experts(model, experts)
        stream.advance()
    return unscaled


def _open(model: nn.Module, stream: LayerStream, targets: Targets) -> tuple[list[str], dict[str, nn.Module]]:
    """(names of the decoder layer's experts, which are linear layers now; its linear layers to quantize, by name)."""
    prefix = stream.name + "."
    experts = targets.take_experts(model, prefix, _plain)
    mine = {name: targets.linears.pop(name) for name in list(targets.linears) if name.startswith(prefix)}
    for name in experts:
        mine |= {f"{name}.{leaf}": module for leaf, module in model.get_submodule(name).named_modules() if is_linear(module)}
    return experts, mine


def _plain(name: str, weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _levels(groups: list[list[str]]) -> list[list[list[str]]]:
    """Groups that do not depend on each other together: those of several experts that differ in the expert's number."""
    levels: dict[str, list[list[str]]] = {}
    for group in groups:
        levels.setdefault(re.sub(r"\.\d+\.", ".*.", group[0]), []).append(group)
    return list(levels.values())


def _scale(layer: nn.Module, readers: list[nn.Module], fold: Fold, moments: Moments, scheme: Scheme) -> None:
    """Search scales for what these layers read, and fold them in."""
    scales = search_scales([weight_of(module) for module in readers], moments, scheme, fold.shared)
    fold.apply(layer, readers, scales)
    moments.divide_(scales)
