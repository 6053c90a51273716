"""Modules that do not reach the paged kernel through transformers' attention interface, or gain by more.

`adapt` swaps mixins onto them, active inside a step only. One module here per mechanism:

- softmax.py: modules with a softmax of their own.
- alibi.py: those with a bias by distance.
- mla.py: multi-head latent attention, whose pages hold latents.
- state.py: layers that keep a state per sequence instead of keys and values.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from torch import nn

from ...base.errors import UnsupportedModel
from ..swap import can_swap, restore, swap
from . import alibi, softmax
from .base import Layer, Positions
from .mla import LATENT, LatentAttention, is_latent_attention, same_as_expanded, why_expanded
from .state import Mixer, PagedMixer, StateProbe, as_mixer

__all__ = ["LATENT", "Adaptations", "LatentAttention", "StateProbe", "adapt"]

# "family.ClassName" of a module in transformers.models -> its mixin.
_MIXINS: dict[str, type] = {
    "bloom.BloomAttention": alibi.BloomAttention,
    "codegen.CodeGenAttention": softmax.GPTJAttention,
    "falcon.FalconAttention": alibi.FalconAttention,
    "gpt_neo.GPTNeoSelfAttention": softmax.GPTNeoSelfAttention,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": softmax.GPTNeoXJapaneseAttention,
    "gptj.GPTJAttention": softmax.GPTJAttention,
    "mpt.MptAttention": alibi.MptAttention,
    "openai.Attention": softmax.OpenAIGPTAttention,
    "xglm.XGLMAttention": softmax.XGLMAttention,
    "xglm.XGLMSinusoidalPositionalEmbedding": softmax.XGLMPositions,
}


@dataclass
class Adaptations:
    """What was adapted in one model; `undo` takes it all back.

    Attributes:
        layers: attention layers with a softmax of their own, by number.
        kinds: what `explain` says of a layer, by number.
        max_positions: the length of the model's shortest table of positions, or None.
        notes: slower paths and their reasons.
    """

    swapped: list[nn.Module] = field(default_factory=list)
    layers: dict[int, Layer] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    max_positions: int | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def swap(self, module: nn.Module, mixin: type, state: Layer | Positions | Mixer | None) -> None:
        if not can_swap(module):
            raise UnsupportedModel(
                f"model: the forward of its {type(module).__name__} was replaced (device_map hooks?); load it without"
            )
        swap(module, mixin, state)
        self.swapped.append(module)
        if isinstance(state, Layer):
            self.layers[state.layer_idx] = state
            if state.kind is not None:
                self.kinds[state.layer_idx] = state.kind
        if isinstance(state, Layer | Positions) and state.max_positions is not None:
            self.max_positions = min(state.max_positions, self.max_positions or state.max_positions)

    def window(self, layer_idx: int) -> int | None:
        """The sliding window that only the attention module's code knows of."""
        layer = self.layers.get(layer_idx)
        return None if layer is None else layer.window

    def undo(self) -> None:
        for module in self.swapped:
            restore(module)
        self.swapped = []


def adapt(model: nn.Module) -> Adaptations:
    """Swap the adapters onto `model`'s modules. Raises UnsupportedModel for one that cannot be adapted."""
    adaptations = Adaptations()
    try:
        for name, module in list(model.named_modules()):
            mixin, mixer = _mixin(module), as_mixer(name, module)
            if mixin is not None:
                adaptations.swap(module, mixin, mixin.describe(module, len(adaptations.layers)))
            elif mixer is not None:
                adaptations.swap(module, PagedMixer, mixer)
            elif is_latent_attention(module):
                _adapt_latent(adaptations, module)
    except BaseException:
        adaptations.undo()
        raise
    return adaptations


def _mixin(module: nn.Module) -> type | None:
    for base in type(module).__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["transformers", "models"]:
            mixin = _MIXINS.get(f"{parts[2]}.{base.__name__}")
            if mixin is not None and not hasattr(sys.modules[base.__module__], "ALL_ATTENTION_FUNCTIONS"):
                return mixin  # this transformers' version of the family is not on the attention interface
    return None


def _adapt_latent(adaptations: Adaptations, module: nn.Module) -> None:
    reason = why_expanded(module)
    if reason is None and not same_as_expanded(module):
        reason = f"{type(module).__name__}.expand_kv is not the form that can be absorbed into the queries"
    if reason is None:
        adaptations.swap(module, LatentAttention, None)
        adaptations.kinds[module.layer_idx] = LATENT
    else:
        adaptations.notes[f"latent attention of layer {module.layer_idx}"] = f"keys and values are expanded: {reason}"
