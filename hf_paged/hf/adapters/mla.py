"""Multi-head latent attention (DeepSeek V2 and V3 and their kin): latents in pages, attention over the latents.

These modules keep one latent c and one rotary key r a token, for all heads, and expand them with `kv_b_proj`, whose
rows are W_uk and W_uv head by head: k[h] = [W_uk[h] c ; r], v[h] = W_uv[h] c. Attention needs no expansion:

    q[h].k[h] = [W_uk[h]^T q_nope[h] ; q_rope[h]] . [c ; r]        sum_j w_j v_j[h] = W_uv[h] sum_j w_j c_j

So the pages hold one KV head with key [c ; r] and value c, which every query head shares (on Triton only the key, of
which the value is a part; the C++ kernels want keys and values in different order). Inside a step `expand_kv` returns
those; the attention function then hands queries to `attend_latent`. The weight is read anew each time.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_paged_kernels import fused

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ..swap import Swapped
from ..watch import is_hooked
from ..weights import has_known_weight
from .base import StockForm, packed

LATENT = "latent (MLA)"
_ATTRIBUTES = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class LatentAttention(StockForm, Swapped):
    def expand_kv(self, kv_nope, k_rot):
        """Latents [B, 1, T, rank], rotary keys [B, 1, T, rope] -> keys and values, in a step the latents' own."""
        if active_context() is None:
            return super().expand_kv(kv_nope, k_rot)
        reason = why_expanded(self)
        if reason is not None:
            raise UnsupportedModel(
                f"model: in layer {self.layer_idx} {reason} since the model was patched; call hf_paged.patch(model) "
                "again"
            )
        return torch.cat((kv_nope, k_rot), dim=-1), kv_nope

    def attend_latent(self, context, query, key, value, *, scale: float, **options) -> torch.Tensor:
        """query [1, H, T, nope + rope]; key, value as `expand_kv` returned them -> [T, H, v_head_dim]."""
        q_nope, q_rope = query[0].split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        w_uk, w_uv = _head_weights(self)
        query = torch.cat((fused.head_linear(q_nope, w_uk), q_rope), dim=-1)
        latent = context.attend(
            self.layer_idx, query.transpose(0, 1), packed(key), packed(value), scale=scale, **options
        )
        return fused.head_linear(latent.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def to_stock(self, key, value):
        return value, key[..., value.shape[-1] :]

    def from_stock(self, key, value, positions):
        return torch.cat((key, value), dim=-1), key


def is_latent_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _ATTRIBUTES)


def why_expanded(module: nn.Module) -> str | None:
    """Why `module` must expand its latents before attention, or None: `kv_b_proj` is no plain live weight."""
    projection = module.kv_b_proj
    kind = projection._hf_paged_base if isinstance(projection, Swapped) else type(projection)
    if kind is not nn.Linear:
        return f"kv_b_proj is a {kind.__name__}, not a plain nn.Linear"
    if not has_known_weight(projection):
        return f"the weight of kv_b_proj is a {type(projection.weight).__name__}, not a plain tensor of floats"
    if projection.bias is not None:
        return "kv_b_proj has a bias"
    if is_hooked(projection):
        return "kv_b_proj has a forward hook"
    return None


def _head_weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """W_uk [H, nope, rank] and W_uv [H, v, rank], views of `kv_b_proj.weight`."""
    sizes = module.qk_nope_head_dim, module.v_head_dim
    weight = module.kv_b_proj.weight
    return weight.view(-1, sum(sizes), module.kv_lora_rank).split(sizes, dim=1)


def same_as_expanded(module: nn.Module) -> bool:
    """Whether scores and values from the latents equal those of the module's own `expand_kv`, on random latents."""
    weight = module.kv_b_proj.weight
    generator = torch.Generator().manual_seed(0)
    rows = lambda *shape: torch.randn(*shape, generator=generator).to(weight)  # noqa: E731
    latent, rotary = rows(1, 1, 3, module.kv_lora_rank), rows(1, 1, 3, module.qk_rope_head_dim)
    key, value = module.expand_kv(latent, rotary)
    w_uk, w_uv = _head_weights(module)
    if key.shape[1] != len(w_uk):
        return False
    query = rows(len(w_uk), 3, key.shape[-1])
    absorbed = torch.cat((query[..., : module.qk_nope_head_dim] @ w_uk, query[..., module.qk_nope_head_dim :]), dim=-1)
    scores = absorbed @ torch.cat((latent, rotary), dim=-1)[0].transpose(1, 2)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    return all(
        (actual - expected).abs().max() <= tolerance * expected.abs().max()
        for actual, expected in ((scores, query @ key[0].transpose(1, 2)), (latent[0] @ w_uv.transpose(1, 2), value[0]))
    )
