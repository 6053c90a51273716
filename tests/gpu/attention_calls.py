"""Calls of the attention kernels for the compile gate."""

from __future__ import annotations

import torch

from hf_paged_kernels import exactness, ops
from hf_paged_kernels.metadata import SharedPrefixes


def attention(
    decodes: int, prompts: int, heads: tuple[int, int] = (32, 8), dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16, kv_dtype: torch.dtype | None = None, block_size: int = 64,
    values_in_keys: bool = False, shared: bool = False, ends: bool = False, **options,
) -> None:  # fmt: skip
    """A step of `decodes` sequences with one new token and `prompts` with 500, each of up to 8000 tokens."""
    q_heads, kv_heads = heads
    num_seqs, tokens = decodes + prompts, decodes + 500 * prompts
    cache = ops.allocate_kv(64, kv_heads, *dims, block_size, kv_dtype or dtype, "cpu", values_in_keys=values_in_keys,
                            backend="triton")  # fmt: skip
    k_scale, v_scale = ops.allocate_scales(cache[1])
    metadata = ops.AttentionMetadata(
        cu_seqlens_q=torch.empty(num_seqs + 1, dtype=torch.int32), seq_lens=torch.empty(num_seqs, dtype=torch.int32),
        block_table=torch.empty(num_seqs, 8000 // block_size, dtype=torch.int32),
        slot_mapping=torch.empty(tokens, dtype=torch.int64), max_seqlen_q=500 if prompts else 1, max_seqlen_k=8000,
        num_decodes=decodes,
        shared=two_prefixes(decodes) if shared else None,
        ends=torch.empty(tokens, dtype=torch.int32) if ends else None,
    )  # fmt: skip
    query = torch.empty(tokens, q_heads, dims[0], dtype=dtype)
    key, value = (torch.empty(tokens, kv_heads, dim, dtype=dtype) for dim in dims)
    ops.attention_(query, key, value, *cache, metadata, scale=0.1, k_scale=k_scale, v_scale=v_scale, **options,
                   backend="triton")  # fmt: skip


def two_prefixes(decodes: int) -> SharedPrefixes:
    members, group_starts, prefix_lens, starts = (torch.empty(n, dtype=torch.int32) for n in (decodes, 3, 2, decodes))
    return SharedPrefixes(members, group_starts, prefix_lens, starts, decodes, 4000, 4000)


def exact(*call, **options) -> None:
    with exactness.exact():
        attention(*call, **options)
