"""Attention modules of the standard structure: a projection, one kernel up to the cache, attention, a projection.

The structure is q_proj, k_proj, v_proj (or a joint qkv_proj) -> heads -> q_norm, k_norm -> rotary embedding ->
attention -> o_proj, the norms and the embedding optional. Sizes, scale, softcap and sinks are those that the module's
own forward hands to attention when it runs in a probe; positions reach to the end of what the model takes, so that a
scale that grows with them is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.quantized import QuantizedWeight

from ...runtime.batch import active_context
from ..attention import drops_softcap, implementation
from ..swap import Swapped, can_swap
from ..weights import weight_of
from .adapted import adapted_linear
from .base import Bypass, Fusions, Parts, idle_children, is_plain, width_of
from .calls import Attended, Call
from .linear import project
from .merged import QKV, Merged, merged_of
from .norm import FusedNorm, has_dtype, norm_of
from .proof import random_rows
from .trial import Trial

JOINED = ("qkv_proj",)
NORMS = ("q_norm", "k_norm")
OUTPUT = "o_proj"


@dataclass(eq=False)
class _Attention(Bypass):
    """
    Attributes:
        projections: the names of the children that make queries, keys and values: three, or one for all.
        merged: the three as one.
        direct: the projections, while one product with their joint weight may stand for them.
        parts: what is bypassed in any case.
        heads: (query heads, key/value heads, size of a query or key head, of a value head).
        rotary: "whole" or "half": whether the tables that the module is given hold every frequency twice, as our
            kernels want them, or once; None: no rotary embedding.
        options: of attention.
        sinks: the name of the parameter that attention gets as sinks.
        drops_softcap: whether the model's implementation of attention was one that ignores a softcap.
    """

    KIND = "attention"

    module: nn.Module
    backend: str
    call: Call
    projections: tuple[str, ...]
    merged: Merged | None
    direct: Parts
    parts: Parts
    heads: tuple[int, int, int, int]
    rotary: str | None
    options: dict
    sinks: str | None
    drops_softcap: bool

    def untouched(self) -> bool:
        children = self.module._modules
        if not self.parts.untouched() or _drops_softcap(self.module) != self.drops_softcap:
            return False
        return NORMS[0] not in children or all(has_dtype(children[name], self.call.dtype) for name in NORMS)

    def run(
        self,
        context,
        x: Tensor,
        embeddings: tuple[Tensor, Tensor],
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """residual + what the module makes of norm(x), [1, T, H]."""
        module, children = self.module, self.module._modules
        query, key, value = self._heads(context, x, norm)
        options = dict(self.options)
        if self.sinks is not None:
            options["sinks"] = module._parameters[self.sinks]
        if NORMS[0] in children:
            options["q_norm"], options["k_norm"] = (norm_of(children[name]) for name in NORMS)
        cos, sin = self._tables(context, embeddings)
        output = context.attend_rotary(module.layer_idx, query, key, value, cos, sin, **options)
        return project(children[OUTPUT], output.flatten(1)[None], residual, self.backend)

    def _tables(self, context, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """cos, sin [T, R] of those that the module was given [1, T, R or R / 2]."""
        if self.rotary is None:
            return None, None
        cos, sin = embeddings
        if self.rotary == "whole":
            return cos[0].contiguous(), sin[0].contiguous()
        kept = context.shared.get("tables")  # the same for all layers
        if kept is None or kept[0] is not cos:
            kept = context.shared["tables"] = (cos, *(torch.cat((table[0],) * 2, dim=-1) for table in (cos, sin)))
        return kept[1:]

    def _heads(self, context, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor, Tensor]:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] of x [1, T, H]."""
        Hq, Hkv, D, Dv = self.heads
        children = [self.module._modules[name] for name in self.projections]
        if (joint := self._joint(children)) is not None:
            layer = self.merged or children[0]
            projected = adapted_linear(context, layer, x, *joint, norm=norm, backend=self.backend)
        else:
            if norm is not None:
                x = fused.rms_norm(x, *norm[:2], offset=norm.offset, cast=norm.cast, backend=self.backend)
            parts = [child(x)[0] for child in children]
            if len(parts) == 3:
                query, key, value = parts
                return query.unflatten(1, (Hq, D)), key.unflatten(1, (Hkv, D)), value.unflatten(1, (Hkv, Dv))
            projected = parts[0][None]
        query, key, value = projected[0].split_with_sizes((Hq * D, Hkv * D, Hkv * Dv), dim=1)
        return query.unflatten(1, (Hq, D)), key.unflatten(1, (Hkv, D)), value.unflatten(1, (Hkv, Dv))

    def _joint(self, children: list[nn.Module]) -> tuple[Tensor | QuantizedWeight, Tensor | None] | None:
        """(weight, bias) of queries, keys and values in one, while one product may stand for what makes them."""
        if not self.direct.untouched():
            return None
        if self.merged is not None:
            return (self.merged.weight, self.merged.bias) if self.merged.joined else None
        return (weight_of(children[0]), children[0].bias) if len(children) == 1 and is_plain(children[0]) else None


class FusedAttention(Swapped):
    def forward(self, *args, **kwargs):
        context, state = active_context(), self._hf_paged
        x = None if context is None else state.call.hidden_states(args, kwargs)
        if x is None or not state.untouched():
            return super().forward(*args, **kwargs)
        return state.run(context, x, kwargs["position_embeddings"]), None


def has_structure(module: nn.Module) -> bool:
    """Whether `module` may be an attention module that can be fused; the proof is in running it."""
    known = can_swap(module) and hasattr(module, "layer_idx") and hasattr(module, "config")
    return known and _projections(module) is not None


def _projections(module: nn.Module) -> tuple[str, ...] | None:
    children = {name for name, child in module._modules.items() if child is not None} - idle_children(module)
    norms = children & set(NORMS)
    if module._buffers or norms and not all(isinstance(module._modules.get(name), FusedNorm) for name in NORMS):
        return None
    return next((names for names in (QKV, JOINED) if children - norms == {*names, OUTPUT}), None)


def fuse_attention(module: nn.Module, call: Call, positions: Tensor, fusions: Fusions) -> str | None:
    """Fuse an attention module that its model calls as `call` says. Returns why it is left alone, or None."""
    x = random_rows(call.size, positions.new_empty(0, dtype=call.dtype))[None]
    trial = Trial(module, call, x, _attention_output, positions, fusions.backend)
    if trial.own is None:
        return "it does more than attend once"
    attended = trial.own.attended
    reason = _why_not(module, attended)
    if reason is not None:
        return reason
    for rotary in _ways_to_rotate(call.arguments["position_embeddings"][0], attended.query):
        state = _describe(module, call, attended, rotary, fusions.backend)
        if not state.untouched():
            return "its parts are hooked"
        difference = trial.difference(state.run)
        if difference is None:
            fusions.swap(module, FusedAttention, state, "attention")
            return None
        reason = reason or f"its {difference} is computed otherwise"
    return reason


def _ways_to_rotate(cos: Tensor, query: Tensor) -> list[str | None]:
    width, head_dim = cos.shape[-1], query.shape[-1]
    whole = ["whole"] if width % 2 == 0 and width <= head_dim else []
    half = ["half"] if 2 * width <= head_dim else []
    return [*whole, *half, None] if cos.dtype == query.dtype else [None]


def _attention_output(result) -> Tensor | None:
    return result[0] if isinstance(result, tuple) and len(result) == 2 and result[1] is None else None


def _inner(layer: nn.Module) -> nn.Module:
    return getattr(layer, "base_layer", layer)


def _why_not(module: nn.Module, attended: Attended) -> str | None:
    """What attention is asked for that a fused form cannot ask."""
    options = attended.options
    if options["layer_idx"] != module.layer_idx or options["alibi_slopes"] is not None:
        return "it asks for attention in a way of its own"
    parameters = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
    if parameters != ({id(options["sinks"])} if options["sinks"] is not None else set()):
        return "it has parameters that do not go to attention as they are"
    head_dim = attended.query.shape[2]
    if any(name in module._modules and module._modules[name].weight.shape != (head_dim,) for name in NORMS):
        return "its norms are not norms of heads"
    layers = [_inner(module._modules[name]) for name in _projections(module)]
    widths = [width_of(layer) if hasattr(layer, "out_features") else None for layer in layers]
    if None in widths or sum(widths) != sum(part[0].numel() for part in attended[:3]):
        return "its projections are more than queries, keys and values"
    return None


def _describe(module: nn.Module, call: Call, attended: Attended, rotary: str | None, backend: str) -> _Attention:
    (_, Hq, D), (_, Hkv, Dv) = attended.query.shape, attended.value.shape
    names, sinks = _projections(module), attended.options["sinks"]
    return _Attention(
        module=module,
        backend=backend,
        call=call,
        projections=names,
        merged=merged_of(module, QKV) if names == QKV else None,
        direct=Parts(module, *names),
        parts=Parts(module, *NORMS, *idle_children(module)),
        heads=(Hq, Hkv, D, Dv),
        rotary=rotary,
        options={name: attended.options[name] for name in ("scale", "softcap")},
        sinks=next((name for name, own in module._parameters.items() if own is not None and own is sinks), None),
        drops_softcap=_drops_softcap(module),
    )


def _drops_softcap(module: nn.Module) -> bool:
    return drops_softcap(implementation(module.config))
