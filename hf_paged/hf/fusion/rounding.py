"""Quantized layers that round their inputs to 8 bits, for a proof: the same layers without, or on other kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ...quant.linear import QuantLinear
from .merged import Merged


def rounds_inputs(module: nn.Module) -> bool:
    """Whether a quantized layer in `module` rounds its inputs."""
    return any(layer.quantized.activations is not None for layer in _layers(module))


@contextmanager
def unrounded(module: nn.Module):
    """While inside, no quantized layer in `module`, merged or not, rounds its inputs."""
    holders = [(layer, "quantized") for layer in _layers(module)]
    holders += [(merged, "weight") for merged in _merged(module)]
    weights = [getattr(*holder) for holder in holders]
    for holder, weight in zip(holders, weights):
        setattr(*holder, replace(weight, activations=None, input_scale=None))
    try:
        yield
    finally:
        for holder, weight in zip(holders, weights):
            setattr(*holder, weight)


@contextmanager
def on_kernels(module: nn.Module, backend: str):
    """While inside, the quantized layers in `module` multiply by the kernels of `backend`, outside a step too.

    Kernels differ in whether they honour a rounding to fp8.
    """
    layers = list(_layers(module))
    for layer in layers:
        layer.backend = backend
    try:
        yield
    finally:
        for layer in layers:
            del layer.backend


def _layers(module: nn.Module) -> Iterator[QuantLinear]:
    return (part for part in module.modules() if isinstance(part, QuantLinear))


def _merged(module: nn.Module) -> list[Merged]:
    """Those of which all layers are in `module`, and whose weight is quantized."""
    layers = list(_layers(module))
    states = [getattr(layer, "_hf_paged", None) for layer in layers]
    found = {id(state[0]): state[0] for state in states if isinstance(state, tuple)}
    return [merged for merged in found.values() if merged.joined]
