"""Families whose attention modules hold an ordinary causal softmax of their own.

GPT-Neo, GPT-NeoX Japanese and OpenAI GPT, and on older transformers GPT-J and CodeGen, have it in a method `_attn`,
which is all that is replaced. XGLM, TrOCR and the BERT-like families have it in `forward`.
"""

from __future__ import annotations

import math
import sys

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from .base import Layer, PagedAttention, packed


class _AttnMethod(PagedAttention):
    """`_attn(query, key, value, attention_mask)` on [1, H, T, D]; rotary embedding is already applied."""

    def _attn(self, query, key, value, *args, **kwargs):
        context = self._step()
        if context is None:
            return super()._attn(query, key, value, *args, **kwargs)
        output = self._attend(context, packed(query), packed(key), packed(value))
        return output.view(1, output.shape[1], value.shape[1], -1).transpose(1, 2), None


class GPTNeoSelfAttention(_AttnMethod):
    BYPASSED = ("attn_dropout",)

    @classmethod
    def describe(cls, module, index):
        window = module.config.window_size if module.attention_type == "local" else None
        return Layer(module.layer_id, 1.0, window=window)


class GPTJAttention(_AttnMethod):
    BYPASSED = ("attn_dropout",)

    @classmethod
    def describe(cls, module, index):
        return Layer(module.layer_idx, 1 / module.scale_attn, max_positions=len(module.embed_positions))


class GPTNeoXJapaneseAttention(_AttnMethod):
    BYPASSED = ("attention_dropout",)

    @classmethod
    def describe(cls, module, index):
        return Layer(module.layer_idx, 1 / module.norm_factor)


class OpenAIGPTAttention(_AttnMethod):
    BYPASSED = ("attn_dropout",)

    @classmethod
    def describe(cls, module, index):
        scale = 1 / math.sqrt(module.split_size // module.n_head) if module.scale else 1.0
        return Layer(index, scale)

    def _attn(self, q, k, v, attention_mask=None, output_attentions=False):
        if active_context() is None:
            return super()._attn(q, k, v, attention_mask, output_attentions)
        return [super()._attn(q, k.transpose(-1, -2), v)[0]]


class XGLMAttention(PagedAttention):
    """Also TrOCR's and MVP's."""

    @classmethod
    def describe(cls, module, index):
        return Layer(module.layer_idx, module.scaling)

    def forward(self, hidden_states, key_value_states=None, *args, **kwargs):
        context = self._step()
        if context is None or key_value_states is not None:
            return super().forward(hidden_states, key_value_states, *args, **kwargs)
        query, key, value = (
            project(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self._attend(context, query, key, value)), None


class BertSelfAttention(PagedAttention):
    """BERT's, as other families have copied it."""

    BYPASSED = ("dropout",)

    @classmethod
    def describe(cls, module, index):
        name = type(module).__name__
        if not getattr(module, "is_decoder", True):
            raise UnsupportedModel(f"model: {name} attends in both directions; set is_decoder=True in its config")
        if not hasattr(sys.modules[type(module).forward.__module__], "create_causal_mask"):
            raise UnsupportedModel(
                f"model: in this transformers {name} attends in both directions, even as a decoder; newer ones have it "
                "right"
            )
        return Layer(module.layer_idx, 1 / math.sqrt(module.attention_head_size))

    def forward(self, hidden_states, attention_mask=None, *args, encoder_hidden_states=None, **kwargs):
        context = self._step()
        if context is None or encoder_hidden_states is not None:
            return super().forward(
                hidden_states, attention_mask, *args, encoder_hidden_states=encoder_hidden_states, **kwargs
            )
        heads = self._packed_heads(hidden_states, **kwargs)
        return self._attend(context, *heads), None

    def _packed_heads(self, hidden_states, **kwargs):
        """[1, T, H] -> query, key and value [T, heads, head size]."""
        for project in (self.query, self.key, self.value):
            yield project(hidden_states)[0].unflatten(-1, (-1, self.attention_head_size))


class RoFormerSelfAttention(BertSelfAttention):
    def _packed_heads(self, hidden_states, *, sinusoidal_pos, **kwargs):
        query, key, value = (heads.transpose(0, 1)[None] for heads in super()._packed_heads(hidden_states))
        if self.rotary_value:
            rotated = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
        else:
            rotated = *self.apply_rotary_position_embeddings(sinusoidal_pos, query, key), value
        return map(packed, rotated)
