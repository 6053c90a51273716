"""Decoder layers: norms and residual sums inside the kernels around them.

A layer is two halves, x + after(attention(before(x))) and x + after(mlp(before(x))), mostly without a norm after.
The norm before goes into the projection that follows it, the sum into the projection before it, or both into one kernel
between the halves where a projection takes nothing in.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from hf_paged_kernels import fused

from ...runtime.batch import active_context
from ..swap import Swapped, can_swap, evaluating
from .attention import FusedAttention, fuse_attention, has_structure
from .base import Bypass, Fusions, Parts, idle_children
from .calls import Call, calls_of, spread_positions
from .mlp import FusedMLP
from .norm import FusedNorm, has_dtype, norm_of
from .proof import random_rows
from .rotary import note_of
from .trial import Trial

ATTENTION = "self_attn"
# Names of the norms (before attention, after it, before the MLP, after it), by family.
FORMS = (
    # Llama and most others
    ("input_layernorm", None, "post_attention_layernorm", None),
    # Gemma 2 and 3
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


@dataclass(eq=False)
class _Layer(Bypass):
    """
    Attributes:
        norms: their names, as in FORMS.
        mlp: the name of the other half.
        parts: what is bypassed in any case. An MLP that is not fused, or whose parts are touched, is called.
        mlp_parts: the MLP, while its fused form is called in its place.
    """

    KIND = "layer"

    module: nn.Module
    backend: str
    call: Call
    norms: tuple[str | None, ...]
    mlp: str
    parts: Parts
    mlp_parts: Parts

    def untouched(self) -> bool:
        children = self.module._modules
        if not self.parts.untouched() or not children[ATTENTION]._hf_paged.untouched():
            return False
        return all(name is None or has_dtype(children[name], self.call.dtype) for name in self.norms)

    def run(self, context, x: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        children = self.module._modules
        before, after, before_mlp, after_mlp = (children.get(name) for name in self.norms)
        attend, norm, mlp = children[ATTENTION]._hf_paged.run, norm_of(before_mlp), children[self.mlp]
        whole = isinstance(mlp, FusedMLP) and self.mlp_parts.untouched() and mlp._hf_paged.untouched()
        weight = mlp._hf_paged.first_weight if whole else None
        summed = after is None and fused.adds_in_linear(x, weight, norm, backend=self.backend)
        y = attend(context, x, embeddings, norm_of(before), x if summed else None)
        if summed:
            x = y
        else:
            y, x = fused.add_rms_norm(y if after is None else after(y), x, norm, backend=self.backend)
            norm = None
        residual = x if after_mlp is None else None
        if whole:
            y = mlp._hf_paged.run(y, norm, residual)
        else:
            y = mlp(y if norm is None else before_mlp(y))
            y = y[0] if isinstance(y, tuple) else y  # beside it, what a router of experts chose
            y = y if residual is None else residual + y
        return y if after_mlp is None else x + after_mlp(y)


class FusedLayer(Swapped):
    def forward(self, *args, **kwargs):
        context, state = active_context(), self._hf_paged
        x = None if context is None else state.call.hidden_states(args, kwargs)
        if x is None or not state.untouched():
            return super().forward(*args, **kwargs)
        return state.run(context, x, kwargs["position_embeddings"])


def fuse_layers(model: nn.Module, fusions: Fusions, limit: int) -> None:
    """Fuse attention modules and decoder layers of `model`, whose smaller parts are already fused.

    Args:
        limit: the most positions the model takes.
    """
    attentions = [module for module in model.modules() if has_structure(module)]
    layers = [module for module in model.modules() if can_swap(module) and _form(module) is not None]
    if not attentions:
        return
    calls = calls_of(model, attentions + layers, limit, fusions.backend)
    positions = spread_positions(limit, next(model.parameters()).device)
    with evaluating(model):
        for modules, fuse in ((attentions, fuse_attention), (layers, _fuse_layer)):
            for module in modules:
                call = calls.get(id(module))
                reason = "it is called in a way of its own" if call is None else fuse(module, call, positions, fusions)
                if reason is not None:
                    fusions.alone[type(module).__name__] = reason
    _forget_rotary(model, fusions)


def _forget_rotary(model: nn.Module, fusions: Fusions) -> None:
    """No rotary function is slow that nobody calls: where all attention modules of a modeling file are fused."""
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    files = {type(module).__module__ for module in attentions if isinstance(module, FusedAttention)}
    for file in files - {type(module).__module__ for module in attentions if not isinstance(module, FusedAttention)}:
        fusions.notes.pop(note_of(file), None)


def _form(module: nn.Module) -> tuple[tuple[str | None, ...], str] | None:
    """(names of its norms, name of its MLP) if the children of `module` are those of a decoder layer."""
    children = {name for name, child in module._modules.items() if child is not None} - idle_children(module)
    if module._buffers or any(parameter is not None for parameter in module._parameters.values()):
        return None
    for names in FORMS:
        norms = {name for name in names if name is not None}
        rest = children - norms - {ATTENTION}
        if norms < children and ATTENTION in children and len(rest) == 1:
            return names, rest.pop()
    return None


def _fuse_layer(module: nn.Module, call: Call, positions: Tensor, fusions: Fusions) -> str | None:
    """Fuse a decoder layer that its model calls as `call` says. Returns why it is left alone, or None."""
    names, mlp = _form(module)
    children = module._modules
    norms = [name for name in names if name is not None]
    if not isinstance(children[ATTENTION], FusedAttention):
        return "its attention is not fused"
    if not all(isinstance(children[name], FusedNorm) for name in norms):
        return "its norms are not fused"
    parts = Parts(module, *norms, *idle_children(module), attention=ATTENTION)
    state = _Layer(module, fusions.backend, call, names, mlp, parts, Parts(module, mlp))
    if not state.untouched():
        return "its parts are hooked"
    weight = children[norms[0]].weight
    x = random_rows(weight.shape[0], weight)[None]
    for stand_in in [children[mlp]] if isinstance(children[mlp], FusedMLP) else [_StandIn(), _StandInPair()]:
        with _replaced(children, mlp, stand_in):
            trial = Trial(module, call, x, lambda result: result, positions, fusions.backend)
            difference = "work" if trial.own is None else trial.difference(state.run)
        if difference is None:
            fusions.swap(module, FusedLayer, state, "layer")
            return None
    return f"its {difference} is computed otherwise"


class _StandIn(nn.Module):
    """For an MLP that is not fused: it is called as it is, so in a proof something cheaper can take its place."""

    def forward(self, hidden_states):
        return hidden_states.flip(-1) * 0.5


class _StandInPair(_StandIn):
    """The same for experts that return what their router chose, too."""

    def forward(self, hidden_states):
        return super().forward(hidden_states), None


@contextmanager
def _replaced(children: dict, name: str, module: nn.Module):
    own, children[name] = children[name], module
    try:
        yield
    finally:
        children[name] = own
