"""BLOOM, MPT and Falcon: ALiBi, a bias on the scores that grows with the key's position; Falcon's rotary form too.

Stock adds slope[h] * j for a key at position j of its own sequence. Where it computes that exactly (MPT; BLOOM in
float32), slope * (j - p) differs by a constant per row, which a softmax does not see, and the kernel does it. Elsewhere
the bias is rounded on its way (Falcon's to bfloat16 always, BLOOM's to its narrow dtype) and no longer linear in j:
then its rounded values are stored with the keys, as one more dimension per query head of a group.
"""

from __future__ import annotations

import math
import sys

import torch

from ...base.errors import UnsupportedModel
from .base import Layer, PagedAttention, packed

ALIBI = "ALiBi"


class _RoundedBias(PagedAttention):
    """Scores scale * q.k + bias[key, head], the bias kept with the keys.

    Head h of a group of G finds its bias in key dimension D + h: its query has 1 / scale there, 0 in the other G - 1.
    """

    def _bias(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """[n, Hq] stock's bias of keys at `positions` [n], if it must be kept."""
        raise NotImplementedError

    def _attend_biased(self, context, query, key, value) -> torch.Tensor:
        """`_attend`, with the bias of the step's own tokens."""
        group = query.shape[1] // key.shape[1]
        picks = torch.eye(group, device=query.device).repeat(key.shape[1], 1) / self._hf_paged.scale
        query = torch.cat((query.float(), picks.expand(len(query), -1, -1)), dim=-1)
        return self._attend(context, query, self._with_bias(key, context.positions), value)

    def _with_bias(self, key, positions):
        """key [n, Hkv, D] -> [n, Hkv, D + G] if there is a bias to keep."""
        bias = self._bias(positions, key.dtype)
        return key if bias is None else torch.cat((key, bias.unflatten(1, (key.shape[1], -1))), dim=-1)

    def to_stock(self, key, value):
        return key[..., : self.head_dim], value

    def from_stock(self, key, value, positions):
        return self._with_bias(key, positions), value


class BloomAttention(_RoundedBias):
    BYPASSED = ("attention_dropout",)

    @classmethod
    def describe(cls, module, index):
        if module.pretraining_tp > 1 and module.slow_but_exact:
            raise UnsupportedModel(
                "model: with config.slow_but_exact and pretraining_tp > 1 BLOOM computes its projections in slices; "
                "set slow_but_exact to False"
            )
        slopes = _slopes("bloom", module.num_heads, next(module.parameters()).device)
        return Layer(module.layer_idx, module.inv_norm_factor, kind=ALIBI, slopes=slopes, shift_free=True)

    def forward(self, hidden_states, residual, alibi, attention_mask, *args, **kwargs):
        context = self._step()
        if context is None:
            return super().forward(hidden_states, residual, alibi, attention_mask, *args, **kwargs)
        query, key, value = map(packed, self._reshape(self.query_key_value(hidden_states)))
        if value.dtype == torch.float32:
            output = self._attend(context, query, key, value, slopes=self._hf_paged.slopes)
        else:
            output = self._attend_biased(context, query, key, value)
        return self.dense(output) + residual, None

    def _bias(self, positions, dtype):
        return None if dtype == torch.float32 else (self._hf_paged.slopes * positions[:, None]).to(dtype)


class MptAttention(PagedAttention):
    @classmethod
    def describe(cls, module, index):
        file = sys.modules["transformers.models.mpt.modeling_mpt"]
        bias = file.build_mpt_alibi_tensor(module.n_heads, 2, device=next(module.parameters()).device)  # of keys p - 1 and p
        return Layer(
            module.layer_idx,
            module.softmax_scale,
            kind=ALIBI,
            slopes=-bias[:, 0, 0].float(),
            max_positions=module.max_seq_length,
            shift_free=True,
        )

    def forward(self, hidden_states, position_bias, *args, **kwargs):
        context = self._step()
        if context is None:
            return super().forward(hidden_states, position_bias, *args, **kwargs)
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = qkv[0].view(-1, 3, self.n_heads, self.head_dim).unbind(1)
        return self.out_proj(self._attend(context, query, key, value, slopes=self._hf_paged.slopes)), None


class FalconAttention(_RoundedBias):
    BYPASSED = ("attention_dropout",)

    @classmethod
    def describe(cls, module, index):
        if not module.config.alibi:
            return Layer(module.layer_idx, module.inv_norm_factor)
        implementation = module.config._attn_implementation
        if implementation != "sdpa":  # "eager" adds the bias twice: in the mask and in the attention module
            raise UnsupportedModel(
                f"model: Falcon with ALiBi gives other tokens with attn_implementation={implementation!r} than with "
                "'sdpa'; load it with attn_implementation='sdpa'"
            )
        slopes = _slopes("falcon", module.num_heads, next(module.parameters()).device)
        return Layer(module.layer_idx, module.inv_norm_factor, kind=ALIBI, slopes=slopes.bfloat16())

    def forward(self, hidden_states, alibi, *args, position_embeddings=None, **kwargs):
        context = self._step()
        if context is None:
            return super().forward(hidden_states, alibi, *args, position_embeddings=position_embeddings, **kwargs)
        query, key, value = self._packed_heads(self.query_key_value(hidden_states)[0])
        if alibi is None:
            rotate = sys.modules["transformers.models.falcon.modeling_falcon"].apply_rotary_pos_emb
            query, key = rotate(query.transpose(0, 1)[None], key.transpose(0, 1)[None], *position_embeddings)
            output = self._attend(context, packed(query), packed(key), value)
        else:
            output = self._attend_biased(context, query, key, value)
        return self.dense(output), None

    def _packed_heads(self, qkv):
        """qkv [T, Hkv * (G + 2) * D]: each KV head follows its G query heads, in all three of Falcon's layouts."""
        if self.new_decoder_architecture:
            num_kv_heads = self.num_kv_heads
        else:
            num_kv_heads = 1 if self.multi_query else self.num_heads
        heads = qkv.view(len(qkv), num_kv_heads, self.num_heads // num_kv_heads + 2, self.head_dim)
        return heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]

    def _bias(self, positions, dtype):
        slopes = self._hf_paged.slopes
        return None if slopes is None else (slopes * positions[:, None]).to(dtype) / math.sqrt(self.head_dim)

    def to_stock(self, key, value):
        key, value = super().to_stock(key, value)
        group = self._cached_group()
        return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    def from_stock(self, key, value, positions):
        group = self._cached_group()
        return super().from_stock(key[:, ::group], value[:, ::group], positions)

    def _cached_group(self) -> int:
        """How often stock's cache repeats each KV head."""
        return self.num_heads // self.num_kv_heads if self.new_decoder_architecture else 1


def _slopes(family: str, num_heads: int, device) -> torch.Tensor:
    """[H] float32, what stock multiplies positions with: its bias for position 1."""
    file = sys.modules[f"transformers.models.{family}.modeling_{family}"]
    mask = torch.ones(1, 2, dtype=torch.int64, device=device)
    return file.build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
