"""Launchers of `attention.cpp`. Signatures and formula are those of `hf_paged_kernels.ops`, which checks them."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from . import build

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
SHARED_UNIT = 256  # keys of a shared prefix that are read at a time: kSplit in attention_tiles.h
_ARGS = struct.Struct("@18P 13q 12q 2q 2d")  # struct Args in attention_store.h
_ERRORS = {
    1: "cu_seqlens_q, seq_lens and block_table do not fit together at sequence {}",
    2: "block_table has a block id at or above the cache's number of blocks in sequence {}",
    3: "slot_mapping points past the end of the cache at token {}",
    4: "shared names sequence {}, which the batch has not, twice, or with more keys than were there before this step",
}
_entry = None


def attention_(
    query, key, value, k_cache, v_cache, metadata, *, scale, window=None, chunk=None, softcap=None, sinks=None,
    alibi_slopes=None, k_scale=None, v_scale=None, out=None, lse=None, split_size=None,
) -> Tensor:  # fmt: skip
    """See `ops.attention_`. `split_size` changes nothing: no row's bits depend on the batch."""
    if lse is not None or out is not None and out.dtype != query.dtype:
        raise ValueError(f"lse must be None and out of the query's dtype {query.dtype} with the C++ kernels")
    num_tokens, num_heads, k_dim = query.shape
    num_blocks, num_kv_heads, block_size, v_dim = v_cache.shape
    if out is None:
        out = query.new_empty(num_tokens, num_heads, v_dim)
    _run(query, key, value, k_cache, v_cache, k_scale, v_scale, out,
         metadata.cu_seqlens_q.data_ptr(), metadata.seq_lens.data_ptr(), metadata.block_table.data_ptr(),
         metadata.slot_mapping.data_ptr(), 0 if metadata.ends is None else metadata.ends.data_ptr(), sinks, alibi_slopes,
         metadata.shared, (num_tokens, *metadata.block_table.shape, num_blocks, block_size, num_heads, num_kv_heads,
         k_dim, v_dim), window or 0, chunk or 0, scale, softcap or 0.0)  # fmt: skip
    return out


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, k_scale=None, v_scale=None
) -> None:
    """See `ops.store_kv`: a batch of no sequences, which is written and attended by nobody."""
    num_blocks, num_kv_heads, block_size, v_dim = v_cache.shape
    _run(key, key, value, k_cache, v_cache, k_scale, v_scale, None, 0, 0, 0, slot_mapping.data_ptr(), 0, None, None, None,
         (key.shape[0], 0, 0, num_blocks, block_size, num_kv_heads, num_kv_heads, key.shape[2], v_dim), 0, 0, 1.0,
         0.0)  # fmt: skip


def _run(query, key, value, k_cache, v_cache, k_scale, v_scale, out, cu_seqlens_q, seq_lens, block_table, slot_mapping,
         ends, sinks, alibi_slopes, shared, sizes, window, chunk, scale, softcap):  # fmt: skip
    global _entry
    if _entry is None:
        entry = build.load().hf_paged_attention
        entry.restype, entry.argtypes = ctypes.c_int64, [ctypes.c_char_p]
        _entry = entry
    query_strides = query.stride()
    if query_strides[2] != 1:
        query = query.contiguous()
        query_strides = query.stride()
    key_at = value_at = new_dtype = 0
    key_strides = value_strides = (0, 0, 1)
    if key is not None:
        key_strides, value_strides = key.stride(), value.stride()
        if key_strides[2] != 1:
            key = key.contiguous()
            key_strides = key.stride()
        if value_strides[2] != 1:
            value = value.contiguous()
            value_strides = value.stride()
        key_at, value_at, new_dtype = key.data_ptr(), value.data_ptr(), _DTYPE_CODES[key.dtype]
    k_strides, v_strides = k_cache.stride(), v_cache.stride()
    if k_strides[2:] != (sizes[4], 1) or v_strides[2:] != (sizes[8], 1):
        raise ValueError("k_cache and v_cache must be contiguous within a block's head")
    k_scale_at = v_scale_at = 0
    scale_strides = (0, 0)
    if k_scale is not None:
        k_scale_at, v_scale_at, scale_strides = k_scale.data_ptr(), v_scale.data_ptr(), k_scale.stride()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().contiguous()
    groups = (0, 0, 0, 0)
    if shared is not None:
        tensors = (shared.members, shared.group_starts, shared.prefix_lens)
        groups = (*(tensor.data_ptr() for tensor in tensors), shared.num_groups)
    packed = _ARGS.pack(
        query.data_ptr(), key_at, value_at, 0 if out is None else out.data_ptr(), k_cache.data_ptr(),
        v_cache.data_ptr(), k_scale_at, v_scale_at, cu_seqlens_q, seq_lens, block_table, slot_mapping, ends,
        0 if sinks is None else sinks.data_ptr(), 0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        *groups, _DTYPE_CODES[query.dtype], new_dtype, _DTYPE_CODES[k_cache.dtype], *sizes,
        query_strides[0], query_strides[1], key_strides[0], key_strides[1], value_strides[0], value_strides[1],
        k_strides[0], k_strides[1], v_strides[0], v_strides[1], scale_strides[0], scale_strides[1], window, chunk,
        scale, softcap,
    )  # fmt: skip
    failed = _entry(packed)
    if failed:
        raise ValueError(_ERRORS[failed % 8].format(failed // 8))
