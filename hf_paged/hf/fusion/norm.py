"""Norms: one kernel instead of five to eight operations."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.norm import CASTS, Norm

from ...runtime.batch import active_context
from ..swap import Swapped, can_swap
from .base import Fusions
from .proof import agree, in_fp32, random_rows


class FusedNorm(Swapped):
    """State: keyword arguments of `fused.rms_norm`."""

    def forward(self, hidden_states):
        same = hidden_states.dtype == self.weight.dtype and hidden_states.stride(-1) == 1
        if active_context() is None or not same:
            return super().forward(hidden_states)
        return fused.rms_norm(hidden_states, self.weight, **self._hf_paged)


class FusedLayerNorm(Swapped):
    """State: the backend."""

    def forward(self, input):
        if active_context() is None or input.dtype != self.weight.dtype or input.stride(-1) != 1:
            return super().forward(input)
        return fused.layer_norm(input, self.weight, self.bias, self.eps, backend=self._hf_paged)


def norm_of(module: nn.Module) -> Norm:
    """What a fused norm does, as an argument of the kernels that apply it on the way; its weight as it is now."""
    options = module._hf_paged
    return Norm(module.weight, options["eps"], options["offset"], options["cast"])


def has_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the weight of a norm still is of that type: some training recipes keep norms in fp32."""
    return getattr(module._parameters.get("weight"), "dtype", None) is dtype


def fuse_norm(module: nn.Module, fusions: Fusions) -> None:
    weight = getattr(module, "weight", None)
    if not can_swap(module) or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return
    if type(module) is nn.LayerNorm:
        _fuse_layer_norm(module, fusions)
    elif "RMSNorm" in type(module).__name__ and takes_one_input(module):
        _fuse_rms_norm(module, fusions)


def _fuse_rms_norm(module: nn.Module, fusions: Fusions) -> None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return
    x = random_rows(module.weight.shape[0], module.weight)
    expected = module(x)
    if expected.shape != x.shape or expected.dtype != x.dtype:
        return
    results = []
    for offset in (0.0, 1.0):
        for cast in CASTS:
            options = {"eps": eps, "offset": offset, "cast": cast, "backend": fusions.backend}
            result = fused.rms_norm(x, module.weight, **options)
            results.append((_distance(result, expected), result, options))
    _, nearest, options = min(results, key=lambda entry: entry[0])
    if agree(nearest, expected, backend=fusions.backend, truth=in_fp32(module, x)):
        fusions.swap(module, FusedNorm, options, "rms_norm")
    else:
        fusions.notes[type(module).__name__] = "its formula is not one of the RMSNorm kernel's"


def _distance(result: Tensor, expected: Tensor) -> float:
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    return float(((result - expected).abs() / scale).float().sum())


def _fuse_layer_norm(module: nn.LayerNorm, fusions: Fusions) -> None:
    """On CPU torch's own is as good."""
    if fusions.backend != "triton":
        return
    x = random_rows(module.weight.shape[0], module.weight)
    result = fused.layer_norm(x, module.weight, module.bias, module.eps, backend=fusions.backend)
    if agree(result, module(x), tolerance=1e-5, backend=fusions.backend, truth=in_fp32(module, x)):
        fusions.swap(module, FusedLayerNorm, fusions.backend, "layer_norm")


def takes_one_input(module: nn.Module) -> bool:
    """False for modules that compute more than our kernels know: gated norms, MLPs shared by several layers."""
    return len(inspect.signature(module.forward).parameters) == 1
