"""Families whose attention modules hold an ordinary causal softmax of their own.

GPT-Neo, GPT-NeoX Japanese and OpenAI GPT, and on older transformers GPT-J and CodeGen, have it in a method `_attn`,
which is all that is replaced. XGLM has it in `forward`.
"""

from __future__ import annotations

import math

from ...runtime.batch import active_context
from ..swap import Swapped
from .base import Layer, PagedAttention, Positions, packed


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
        return Layer(module.layer_id, 1.0, window=window, max_positions=module.bias.shape[-1])


class GPTJAttention(_AttnMethod):
    BYPASSED = ("attn_dropout",)

    @classmethod
    def describe(cls, module, index):
        return Layer(module.layer_idx, 1 / module.scale_attn, max_positions=module.embed_positions.shape[0])


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
        return Layer(index, scale, max_positions=module.bias.shape[-1])

    def _attn(self, q, k, v, attention_mask=None, output_attentions=False):
        if active_context() is None:
            return super()._attn(q, k, v, attention_mask, output_attentions)
        return [super()._attn(q, k.transpose(-1, -2), v)[0]]


class XGLMAttention(PagedAttention):
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


class XGLMPositions(Swapped):
    """Stock looks up rows of a table that it replaces by a longer one when the packed batch has more rows than it."""

    @classmethod
    def describe(cls, module, index):
        return Positions(len(module.weights) - module.offset)

    def forward(self, position_ids=None, *args, **kwargs):
        if active_context() is None:
            return super().forward(position_ids, *args, **kwargs)
        return self.weights[position_ids + self.offset]
