"""Paged attention in plain torch, on any device: what the fast kernels are tested against, and their fallback.

Signatures, shapes and formula are those of `hf_paged_kernels.ops`, which checks the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import quantize

_MAX_SCORES = 16 * 2**20  # floats of one score matrix: long chunks over long contexts are cut to fit


def attention_(
    query, key, value, k_cache, v_cache, metadata, *, scale, window=None, chunk=None, softcap=None, sinks=None,
    alibi_slopes=None, k_scale=None, v_scale=None, out=None, lse=None, split_size=None,
) -> Tensor:  # fmt: skip
    """See `ops.attention_`. Sequences are computed one by one, so `split_size` changes nothing."""
    if key is not None:
        store_kv(key, value, k_cache, v_cache, metadata.slot_mapping, k_scale=k_scale, v_scale=v_scale)
    if out is None:
        out = query.new_empty(*query.shape[:2], v_cache.shape[3])
    starts, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
    num_heads, ends = query.shape[1], metadata.ends
    for seq, seq_len in enumerate(seq_lens):
        rows_per_tile = max(1, _MAX_SCORES // (max(seq_len, 1) * num_heads))
        for start in range(starts[seq], starts[seq + 1], rows_per_tile):
            stop = min(start + rows_per_tile, starts[seq + 1])
            first_position = seq_len - (starts[seq + 1] - start)
            if first_position < 0:  # padding
                result, sums = 0.0, float("-inf")
            else:
                result, sums = _attend(
                    query[start:stop], first_position, k_cache, v_cache, k_scale, v_scale, metadata.block_table[seq],
                    scale, window, chunk, softcap, sinks, alibi_slopes, None if ends is None else ends[start:stop],
                )  # fmt: skip
            out[start:stop] = result
            if lse is not None:
                lse[start:stop] = sums
    return out


def _attend(
    query, first_position, k_cache, v_cache, k_scale, v_scale, block_table, scale, window, chunk, softcap, sinks,
    alibi_slopes, ends,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(result [n, Hq, Dv], lse [n, Hq]) of n consecutive rows of one sequence, the first at `first_position`."""
    num_rows, num_heads, _ = query.shape
    num_kv_heads, block_size = v_cache.shape[1:3]
    last_position = first_position + num_rows - 1
    lowest = 0 if window is None else max(0, first_position - window + 1)
    if chunk is not None:
        lowest = first_position - first_position % chunk
    p = torch.arange(first_position, last_position + 1, device=query.device)[:, None]
    end = p + 1 if ends is None else torch.maximum(ends[:, None], p + 1)
    last_seen = last_position if ends is None else int(end.max()) - 1
    first_block, end_block = lowest // block_size, last_seen // block_size + 1
    blocks = block_table[first_block:end_block].long()
    j = torch.arange(first_block * block_size, last_seen + 1, device=query.device)
    visible = (j < end) & (blocks >= 0).repeat_interleave(block_size)[: len(j)]
    if window is not None:
        visible &= j > p - window
    if chunk is not None:
        visible &= j >= p - p % chunk

    # Blocks that are not there, and slots no row sees, must not reach a product: 0 * NaN is NaN.
    seen = visible.any(0)
    keys, values = _read(k_cache, v_cache, k_scale, v_scale, blocks.clamp(min=0), len(j))
    keys, values = keys.float(), values.float()
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
    result = result.view(num_heads, num_rows, -1).transpose(0, 1).to(query.dtype)
    return result, scores.logsumexp(-1).T


def _read(k_cache, v_cache, k_scale, v_scale, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys [Hkv, Dk, L] and values [Hkv, L, Dv] of the first L slots of some blocks, float32 if they are quantized."""
    key = _raw(k_cache)[blocks].view(k_cache.dtype).permute(1, 2, 0, 3).flatten(2)[:, :, :length]
    value = _raw(v_cache)[blocks].view(v_cache.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
    if k_scale is None:
        return key, value
    k_scale, v_scale = (scale[blocks].transpose(0, 1).flatten(1)[:, :length] for scale in (k_scale, v_scale))
    return key.float() * k_scale[:, None], value.float() * v_scale[..., None]


def _raw(cache: Tensor) -> Tensor:
    """The cache itself, or its bytes if torch cannot index its type."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def merge_states(parts: Tensor, part_lses: Tensor, out: Tensor, *, sinks=None, lse: Tensor | None = None) -> Tensor:
    """See `ops.merge_states`."""
    total = part_lses.logsumexp(0)  # [T, H]
    present = part_lses != float("-inf")
    weights = torch.where(present, (part_lses - total).exp(), 0.0)
    if sinks is not None:
        weights = weights * torch.sigmoid(total - sinks.float())
    out.copy_((parts.float().masked_fill(~present[..., None], 0.0) * weights[..., None]).sum(0))
    if lse is not None:
        lse.copy_(total)
    return out


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, k_scale=None, v_scale=None
) -> None:
    """See `ops.store_kv`."""
    written = slot_mapping >= 0
    if not bool(written.all()):
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    block_size = v_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    if k_scale is not None:
        key, k_scale[block, :, offset] = quantize(key, k_cache.dtype)
        value, v_scale[block, :, offset] = quantize(value, v_cache.dtype)
    _raw(k_cache)[block, :, :, offset] = _raw(key.to(k_cache.dtype))
    _raw(v_cache)[block, :, offset] = _raw(value.to(v_cache.dtype))


def copy_blocks(
    k_cache: Tensor, v_cache: Tensor, pairs: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """See `ops.copy_blocks`."""
    source, destination = pairs.to(k_cache.device).unbind(1)
    for tensor in (_raw(k_cache), _raw(v_cache), k_scale, v_scale):
        if tensor is not None:
            tensor[destination] = tensor[source]


def read_keys(k_cache: Tensor, slots: Tensor, *, k_scale=None) -> Tensor:
    """See `ops.read_keys`."""
    block, offset = slots // k_cache.shape[3], slots % k_cache.shape[3]
    key = _raw(k_cache)[block, :, :, offset].view(k_cache.dtype)
    return key if k_scale is None else key.float() * k_scale[block, :, offset][..., None]


def gather_kv(
    k_cache: Tensor, v_cache: Tensor, block_table_row: Tensor, length: int, *, k_scale=None, v_scale=None
) -> tuple[Tensor, Tensor]:
    """See `ops.gather_kv`."""
    blocks = block_table_row[: -(-length // v_cache.shape[2])].long()
    key, value = _read(k_cache, v_cache, k_scale, v_scale, blocks, length)
    return key.permute(2, 0, 1), value.transpose(0, 1)
