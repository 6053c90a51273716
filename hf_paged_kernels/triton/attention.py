"""Paged attention on Triton: which kernel takes which sequences of a step."""

from __future__ import annotations

from torch import Tensor

from ..checks import TRITON_MAX_HEAD_DIM, values_lie_in_keys
from ..exactness import is_exact
from .attention_tile import AttentionCall
from .cascade import cascade
from .decode import MAX_ROWS, decode
from .mla import latent_attention
from .prefill import prefill
from .store_kv import store_kv


def attention_(
    query, key, value, k_cache, v_cache, metadata, *, scale, window=None, chunk=None, softcap=None, sinks=None,
    alibi_slopes=None, k_scale=None, v_scale=None, out=None, lse=None, split_size=None,
) -> Tensor:  # fmt: skip
    """See `ops.attention_`.

    Where every sequence has few new tokens, and none sees beyond itself, all of them go to the decode kernel. Else only the leading
    `metadata.num_decodes` do, and the prefill kernel takes the rest. In exact mode it takes all.
    """
    num_tokens, num_heads, _ = query.shape
    if key is not None:
        store_kv(key, value, k_cache, v_cache, metadata.slot_mapping, k_scale=k_scale, v_scale=v_scale)
    if out is None:
        out = query.new_empty(num_tokens, num_heads, v_cache.shape[3])
    if not num_tokens:
        return out
    sinks, alibi_slopes = (None if heads is None else heads.contiguous() for heads in (sinks, alibi_slopes))
    if query.stride(2) != 1 or query.stride(1) * num_heads >= 2**31:  # heads are counted in 32 bits
        query = query.contiguous()
    call = AttentionCall(
        query, k_cache, v_cache, k_scale, v_scale, metadata, sinks,
        alibi_slopes, scale, softcap, window or chunk or 0, "window" if window else "chunk" if chunk else "all",
    )  # fmt: skip
    if values_lie_in_keys(k_cache, v_cache):
        if metadata.ends is not None:
            raise ValueError("metadata.ends must be None with values that lie in the keys; backend='reference' has no limit")
        latent_attention(call, out, lse)
        return out
    if max(k_cache.shape[2], v_cache.shape[3]) > TRITON_MAX_HEAD_DIM:
        raise ValueError(f"k_cache and v_cache have head sizes {k_cache.shape[2]} and {v_cache.shape[3]}; the Triton "
                         f"kernels take at most {TRITON_MAX_HEAD_DIM}, backend='reference' any")  # fmt: skip
    if is_exact():
        prefill(call, 0, out, lse, exact=True)
        return out
    decodes, max_q = metadata.num_decodes, metadata.max_seqlen_q
    if metadata.shared is not None and call.kind == "all" and split_size is None:
        cascade(call, out[:decodes], None if lse is None else lse[:decodes])
        if decodes < metadata.num_seqs:
            prefill(call, decodes, out, lse)
        return out
    few = split_size is None and max_q * call.group <= MAX_ROWS and metadata.ends is None
    if max_q == 1 or few:
        decode(call, metadata.num_seqs, max_q, out, lse, split_size)
        return out
    if decodes:
        decode(call, decodes, 1, out[:decodes], None if lse is None else lse[:decodes], split_size)
    prefill(call, decodes, out, lse)
    return out
