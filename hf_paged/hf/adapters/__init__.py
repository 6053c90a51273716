"""Modules that do not reach the paged kernel through transformers' attention interface, or gain by more.

`adapt` swaps mixins onto them, active inside a step only. One module here per mechanism:

- softmax.py: modules with a softmax of their own.
- positions.py: modules that count the rows of the batch instead of taking positions.
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
from . import alibi, positions, softmax
from .base import Layer, PaddingFlaw, Place, PlacedAttention, StockForm
from .mla import LATENT, LatentAttention, is_latent_attention, same_as_expanded, why_expanded
from .state import Mixer, StateProbe, describe_mixer, mixer_class

__all__ = ["LATENT", "Adaptations", "LatentAttention", "StateProbe", "StockForm", "adapt"]

# "family.ClassName" of a module in transformers.models -> its mixin.
_MIXINS: dict[str, type] = {
    "big_bird.BigBirdSelfAttention": softmax.BertSelfAttention,
    "bloom.BloomAttention": alibi.BloomAttention,
    "codegen.CodeGenAttention": softmax.GPTJAttention,
    "falcon.FalconAttention": alibi.FalconAttention,
    "gpt_neo.GPTNeoSelfAttention": softmax.GPTNeoSelfAttention,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": softmax.GPTNeoXJapaneseAttention,
    "gptj.GPTJAttention": softmax.GPTJAttention,
    "megatron_bert.MegatronBertSelfAttention": softmax.BertSelfAttention,
    "mpt.MptAttention": alibi.MptAttention,
    "mvp.MvpAttention": softmax.XGLMAttention,
    "openai.Attention": softmax.OpenAIGPTAttention,
    "rembert.RemBertSelfAttention": softmax.BertSelfAttention,
    "roformer.RoFormerSelfAttention": softmax.RoFormerSelfAttention,
    "trocr.TrOCRAttention": softmax.XGLMAttention,
    "xglm.XGLMAttention": softmax.XGLMAttention,
}
_POSITION_MIXINS: dict[str, type] = {
    "bart.BartLearnedPositionalEmbedding": positions.CountedPositions,
    "blenderbot.BlenderbotLearnedPositionalEmbedding": positions.CountedPositions,
    "blenderbot_small.BlenderbotSmallLearnedPositionalEmbedding": positions.CountedPositions,
    "llama4.Llama4TextAttention": positions.Llama4TextAttention,
    "marian.MarianSinusoidalPositionalEmbedding": positions.CountedPositions,
    "mbart.MBartLearnedPositionalEmbedding": positions.CountedPositions,
    "mvp.MvpLearnedPositionalEmbedding": positions.CountedPositions,
    "pegasus.PegasusSinusoidalPositionalEmbedding": positions.CountedPositions,
    "plbart.PLBartLearnedPositionalEmbedding": positions.CountedPositions,
    "roformer.RoFormerSinusoidalPositionalEmbedding": positions.CountedPositions,
    "trocr.TrOCRLearnedPositionalEmbedding": positions.CountedPositions,
    "trocr.TrOCRSinusoidalPositionalEmbedding": positions.TrOCRSinusoidalPositions,
    "whisper.WhisperPositionalEmbedding": positions.CountedPositions,
    "xglm.XGLMSinusoidalPositionalEmbedding": positions.XGLMPositions,
}


@dataclass
class Adaptations:
    """What was adapted in one model; `undo` takes it all back.

    Attributes:
        layers: attention layers with a softmax of their own, by number.
        forms: how transformers' own cache keeps what the pages of a layer hold, where that is not the same.
        kinds: what `explain` says of a layer, by number.
        max_positions: the most positions its layers are made for, or None.
        shift_free: whether the model sees differences of positions only.
        padding_flaw: how stock's own rows depend on the padding on their left; None if they do not.
        notes: slower paths and their reasons.
    """

    swapped: list[nn.Module] = field(default_factory=list)
    layers: dict[int, Layer] = field(default_factory=dict)
    forms: dict[int, StockForm] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    max_positions: int | None = None
    shift_free: bool = False
    padding_flaw: PaddingFlaw | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def swap(self, module: nn.Module, mixin: type, state: Layer | PaddingFlaw | Place | Mixer | None) -> None:
        if not can_swap(module):
            raise UnsupportedModel(
                f"model: the forward of its {type(module).__name__} was replaced (device_map hooks?); load it without"
            )
        swap(module, mixin, state)
        self.swapped.append(module)
        if isinstance(state, PaddingFlaw):
            self.padding_flaw = state
        if isinstance(state, Layer):
            self.layers[state.layer_idx] = state
            self.forms[state.layer_idx] = module
            self.shift_free |= state.shift_free
            if state.kind is not None:
                self.kinds[state.layer_idx] = state.kind
            self.max_positions = state.max_positions

    def window(self, layer_idx: int) -> int | None:
        """The sliding window that only the attention module's code knows of."""
        layer = self.layers.get(layer_idx)
        return None if layer is None else layer.window

    def form(self, layer_idx: int) -> StockForm:
        """How transformers' own cache keeps what the pages of a layer hold."""
        return self.forms.get(layer_idx, StockForm())

    def outdated(self) -> str | None:
        """What happened to the model that its pages cannot follow until it is patched again; None if nothing did."""
        for module in self.forms.values():
            if isinstance(module, LatentAttention) and (reason := why_expanded(module)):
                where = f"in layer {module.layer_idx}"
                return f"{where} {reason} since the model was patched; call hf_paged.patch(model) again"
        return None

    def undo(self) -> None:
        for module in self.swapped:
            restore(module)
        self.swapped, self.forms = [], {}


def adapt(model: nn.Module) -> Adaptations:
    """Swap the adapters onto `model`'s modules. Raises UnsupportedModel for one that cannot be adapted."""
    adaptations = Adaptations()
    try:
        for name, module in list(model.named_modules()):
            mixin, mixer = _mixin(module), mixer_class(module)
            if mixin is not None:
                adaptations.swap(module, mixin, mixin.describe(module, len(adaptations.layers)))
            elif mixer is not None:
                adaptations.swap(module, mixer, describe_mixer(name, module))
                adaptations.padding_flaw = mixer.PADDING_FLAW or adaptations.padding_flaw
            elif PlacedAttention.fits(module):
                adaptations.swap(module, PlacedAttention, PlacedAttention.describe(name))
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
            name = f"{parts[2]}.{base.__name__}"
            if name in _POSITION_MIXINS:
                return _POSITION_MIXINS[name]
            if name in _MIXINS and not hasattr(sys.modules[base.__module__], "ALL_ATTENTION_FUNCTIONS"):
                return _MIXINS[name]  # in this transformers the family is not on the attention interface
    return None


def _adapt_latent(adaptations: Adaptations, module: nn.Module) -> None:
    reason = why_expanded(module)
    if reason is None and not same_as_expanded(module):
        reason = f"{type(module).__name__}.expand_kv is not the form that can be absorbed into the queries"
    if reason is None:
        adaptations.swap(module, LatentAttention, None)
        adaptations.forms[module.layer_idx] = module
        adaptations.kinds[module.layer_idx] = LATENT
    else:
        adaptations.notes[f"latent attention of layer {module.layer_idx}"] = f"keys and values are expanded: {reason}"
