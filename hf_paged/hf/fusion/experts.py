"""Mixtures of experts: quantized ones, and the experts implementation that transformers calls, by name, on Triton.

Inside a step the experts of a small batch run our kernels; large batches, and everything outside a step, run the
implementation that the model has. On CPU that is as good, and nothing is switched. Quantized experts are modules of ours
(quant/experts.py); they run the kernels of the model's backend.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from hf_paged_kernels import fused

from ...quant.experts import ExpertLayers, QuantExperts
from ...runtime.batch import active_context
from ..swap import Swapped, can_swap
from ..switch import Switch
from .base import Fusions
from .mlp import ACTIVATIONS
from .proof import error, proven, random_rows
from .sharded import WholeExperts, is_sharded, local_parameters

NAME = "hf_paged"
# `with paged_experts(configs):` they name our function as their experts implementation.
paged_experts = Switch("_experts_implementation_internal", NAME)
# Expert after expert: a token's sums have one order, whatever else is in the batch.
eager_experts = Switch("_experts_implementation_internal", "eager")
LIMIT = 1e-4  # of fp32: largest difference as a share of a row's largest value
LIMIT_NARROW = 0.02  # of bf16 and fp16: root mean square of a row's differences as a share of the row's


def paged_experts_forward(module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    if active_context() is None or not _takes(module, hidden_states, top_k_index):
        return _own(module)(module, hidden_states, top_k_index, top_k_weights)
    return _run(module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, paged_experts_forward)


def _own(module):
    """What the model runs when it is not patched."""
    name = paged_experts.original(module.config)
    if name in ALL_EXPERTS_FUNCTIONS:
        return ALL_EXPERTS_FUNCTIONS[name]
    return _class_of(module).forward.__wrapped__  # its class's own, "eager"


def _takes(module, hidden_states: Tensor, top_k_index: Tensor) -> bool:
    weight, bias = _first(module)
    return hidden_states.dim() == 2 and fused.supports_grouped_linear(
        hidden_states, weight, top_k_index.reshape(-1), bias, backend="triton"
    )


def _run(module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    weight, bias = _first(module)
    down = module.down_proj.mT if module.is_transposed else module.down_proj
    return fused.moe_experts(
        hidden_states, weight, down, top_k_index, top_k_weights, activation=activation_of(module), gate_up_bias=bias,
        down_bias=module.down_proj_bias if module.has_bias else None,
        after=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        partial=isinstance(module, WholeExperts), backend="triton",
    )  # fmt: skip


def _first(module) -> tuple[Tensor, Tensor | None]:
    """Weight [E, N, H] and bias [E, N] of what comes before the activation."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)
    return weight.mT if module.is_transposed else weight, getattr(module, f"{name}_bias") if module.has_bias else None


def activation_of(module: nn.Module):
    """The name that our kernels have for what experts do between their projections, or the function that does it."""
    if not module.has_gate:
        return module.act_fn
    kind = ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    plain = module.is_concatenated and type(module)._apply_gate is _default_apply_gate and kind is not None
    return kind if plain else module._apply_gate


class FusedExperts(Swapped):
    """Quantized experts. State: the backend."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if active_context() is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        return self.run(hidden_states, top_k_index, top_k_weights, self._hf_paged)


def fuse_experts(model: nn.Module, fusions: Fusions) -> None:
    """Note in `fusions` the configs that `paged_experts` may switch: those of experts proven to compute the same."""
    for module in list(model.modules()):
        if isinstance(module, QuantExperts) and can_swap(module):
            fusions.swap(module, FusedExperts, fusions.backend, "experts")
        elif isinstance(module, ExpertLayers) and module.reason is not None:
            fusions.notes[f"{module.num_experts} experts"] = f"they run one after the other: {module.reason}"
    modules = [module for module in model.modules() if is_experts(module)]
    if fusions.exact:
        fusions.eager_configs = list({id(module.config): module.config for module in modules}.values())
    if fusions.backend != "triton":
        return
    for module in modules:
        with local_parameters(module):
            reason = _why_not(module)
        if not proven(reason is None):
            reason = reason or "those of another rank do not run on the kernel"
            fusions.notes[type(module).__name__] = reason
            return
    fusions.expert_configs = list({id(module.config): module.config for module in modules}.values())
    if modules:
        fusions.counts["experts"] += len(modules)


def is_experts(module: nn.Module) -> bool:
    """Whether this module's forward asks the experts interface what to run."""
    return hasattr(_class_of(module).forward, "__wrapped__") and hasattr(module, "is_transposed")


def _class_of(module: nn.Module) -> type:
    """The class that transformers made, of sharded experts, too."""
    return type(module)._hf_paged_base if is_sharded(module) else type(module)


def _why_not(module: nn.Module) -> str | None:
    weight, _ = _first(module)
    x = random_rows(weight.shape[2], weight)
    top_k = min(2, len(weight))
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(len(x), len(weight), generator=generator).argsort(-1)[:, :top_k].to(x.device)
    router = torch.rand(len(x), top_k, generator=generator).to(x)
    if not _takes(module, x, index):
        return "its experts' weights are not of a kind that the kernel takes"
    expected, actual = (function(module, x, index, router) for function in (_own(module), _run))
    if expected.dtype == torch.float32:
        scale = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        same = ((actual - expected).abs() / scale).max() <= LIMIT
    else:
        same = error(actual, expected.float()) <= LIMIT_NARROW
    return None if same else "its experts compute more than act(gate) * up"
