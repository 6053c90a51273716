"""Paged attention in plain torch, on any device: what the fast kernels are tested against, and their fallback.

Signatures, shapes and formula are those of `hf_paged_kernels.ops`, which checks the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_SCORES = 16 * 2**20  # floats of one score matrix: long chunks over long contexts are cut to fit


def attention_(
    query, key, value, k_cache, v_cache, metadata, *, scale, window=None, chunk=None, softcap=None, sinks=None,
    alibi_slopes=None, out=None,
) -> Tensor:  # fmt: skip
    """See `ops.attention_`."""
    if key is not None:
        store_kv(key, value, k_cache, v_cache, metadata.slot_mapping)
    if out is None:
        out = query.new_empty(*query.shape[:2], v_cache.shape[3])
    starts, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
    num_heads = query.shape[1]
    for seq, seq_len in enumerate(seq_lens):
        rows_per_tile = max(1, _MAX_SCORES // (max(seq_len, 1) * num_heads))
        for start in range(starts[seq], starts[seq + 1], rows_per_tile):
            stop = min(start + rows_per_tile, starts[seq + 1])
            first_position = seq_len - (starts[seq + 1] - start)
            out[start:stop] = _attend(query[start:stop], first_position, k_cache, v_cache, metadata.block_table[seq],
                                      scale, window, chunk, softcap, sinks, alibi_slopes)  # fmt: skip
    return out


def _attend(query, first_position, k_cache, v_cache, block_table, scale, window, chunk, softcap, sinks, alibi_slopes):
    """[n, Hq, Dv] for n consecutive rows of one sequence, the first at `first_position`."""
    num_rows, num_heads, _ = query.shape
    num_kv_heads, block_size = v_cache.shape[1:3]
    last_position = first_position + num_rows - 1
    lowest = 0 if window is None else max(0, first_position - window + 1)
    if chunk is not None:
        lowest = first_position - first_position % chunk
    first_block, end_block = lowest // block_size, last_position // block_size + 1
    blocks = block_table[first_block:end_block].long()
    j = torch.arange(first_block * block_size, last_position + 1, device=query.device)
    p = torch.arange(first_position, last_position + 1, device=query.device)[:, None]
    visible = (j <= p) & (blocks >= 0).repeat_interleave(block_size)[: len(j)]
    if window is not None:
        visible &= j > p - window
    if chunk is not None:
        visible &= j >= p - p % chunk

    # Blocks that are not there, and slots no row sees, must not reach a product: 0 * NaN is NaN.
    seen = visible.any(0)
    keys = k_cache[blocks.clamp(min=0)].permute(1, 2, 0, 3).flatten(2)[:, :, : len(j)].float()  # [Hkv, Dk, L]
    values = v_cache[blocks.clamp(min=0)].transpose(0, 1).flatten(1, 2)[:, : len(j)].float()  # [Hkv, L, Dv]
    values = values.masked_fill(~seen[:, None], 0)
    q = query.float().transpose(0, 1).reshape(num_kv_heads, -1, query.shape[2])  # rows of a KV head: [group, n]
    scores = (q @ keys).mul_(scale).view(num_heads, num_rows, len(j))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float()[:, None, None] * (j - p)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(num_heads, num_rows, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    result = weights.reshape(num_kv_heads, -1, len(j)) @ values
    return result.view(num_heads, num_rows, -1).transpose(0, 1).to(query.dtype)


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `ops.store_kv`."""
    written = slot_mapping >= 0
    if not bool(written.all()):
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    block_size = v_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, :, offset] = key.to(k_cache.dtype)
    v_cache[block, :, offset] = value.to(v_cache.dtype)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    """See `ops.copy_blocks`."""
    source, destination = pairs.to(k_cache.device).unbind(1)
    k_cache[destination] = k_cache[source]
    v_cache[destination] = v_cache[source]


def gather_kv(k_cache: Tensor, v_cache: Tensor, block_table_row: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """See `ops.gather_kv`."""
    block_size = v_cache.shape[2]
    blocks = block_table_row[: -(-length // block_size)].long()
    key = k_cache[blocks].permute(0, 3, 1, 2).flatten(0, 1)[:length]
    value = v_cache[blocks].transpose(1, 2).flatten(0, 1)[:length]
    return key, value
