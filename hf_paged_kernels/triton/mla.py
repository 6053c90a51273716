"""Attention over latents, as multi-head latent attention has it once its projections are absorbed (DeepSeek V2, arXiv
2405.04434): one key [c ; r] a token for all G query heads, whose first Dv dimensions c are the value as well.

    s[h, j] = scale * (q_c[h] . c[j] + q_r[h] . r[j])        out[h] = sum_j softmax(s[h])[j] c[j]

A tile of latents is read from memory once and serves both products. Rows of a tile are (token, head) pairs of one
sequence, so that decodes and prompts run the same code. Where that leaves multiprocessors idle, the positions are cut
into splits, whose results are merged by the logarithms of their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import AttentionCall, finish_rows, load_query, load_tile, padded
from .launch import arch, launch, num_sms
from .merge import merge_states

_FEW_ROWS = 64  # of a sequence: up to here all sequences get as many tiles, beyond it they are counted by their lengths
_MIN_SPLIT = 128  # positions: a split writes its sums, 2 KiB of float32 a row, and somebody reads them
_MAX_SPLITS = 64


class _Tile(NamedTuple):
    rows: int  # (token, head) pairs
    positions: int
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs that fit on a multiprocessor at once


# The queries and the tiles in flight, rows of 576 dimensions, have to fit into shared memory (227 KiB on sm_90 and
# sm_100, 163 on sm_80, 64 on AMD), and the sums, [rows, 512] of float32, into registers. 16 rows are bound by memory;
# four warps take 8 positions of their scores each. From 64 rows on there is wgmma, and two warp groups share the sums.
_TILES_OF_16 = {"gfx": _Tile(16, 16, 4, 2), "sm_80": _Tile(16, 32, 4, 3), "sm_90": _Tile(16, 32, 4, 3, per_sm=2)}
_TILES_OF_MORE = {
    "gfx": _Tile(32, 16, 4, 2),
    "sm_80": _Tile(32, 32, 8, 3),
    "sm_90": _Tile(64, 32, 8, 3),
    "sm_100": _Tile(64, 32, 8, 2),
}
_TILE_OF_FLOAT32 = _Tile(16, 16, 4, 2)  # no matrix units: for comparisons


def latent_attention(call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
    """Fill out [T, G, Dv] and lse [T, G] for a cache whose values are a view of its keys.

    Raises:
        ValueError: for what no latent attention has, windows, chunks, softcaps, ALiBi; and quantized caches.
    """
    if call.kind != "all" or call.softcap is not None or call.slopes is not None or call.k_scale is not None:
        raise ValueError("v_cache is a view of k_cache: no window, chunk, softcap, alibi_slopes or k_scale with it")
    if call.num_kv_heads != 1 or call.k_cache.stride(2) != 1:
        raise ValueError("v_cache is a view of k_cache, which must have one head, its dimensions contiguous")
    decodes, num_seqs, max_q = call.metadata.num_decodes, call.metadata.num_seqs, call.metadata.max_seqlen_q
    if max_q == 1 or max_q * call.group <= _FEW_ROWS:
        _attend(call, 0, num_seqs, max_q, out, lse)
        return
    if decodes:
        _attend(call, 0, decodes, 1, out[:decodes], None if lse is None else lse[:decodes])
    _attend(call, decodes, num_seqs, max_q, out, lse)


def _attend(call: AttentionCall, first_seq: int, end_seq: int, max_q: int, out: Tensor, lse: Tensor | None) -> None:
    """Sequences `first_seq` to `end_seq`, of at most `max_q` new tokens each; the last of them are the last of `out`."""
    device, num_rows, group = out.device, out.shape[0], call.group
    tile = _tile(call, max_q * group)
    counted = max_q > 1 and max_q * group > _FEW_ROWS
    if counted:
        num_tiles = (num_rows - first_seq) * group // tile.rows + end_seq - first_seq  # at most
    else:
        num_tiles = (end_seq - first_seq) * triton.cdiv(max_q * group, tile.rows)
    # A bound on the lengths is all it depends on, so that a captured launch fits every step of as many sequences.
    splits = num_sms(device) * tile.per_sm // num_tiles
    splits = max(1, min(splits, _MAX_SPLITS, triton.cdiv(call.metadata.max_seqlen_k, _MIN_SPLIT)))
    parts, part_lses, sinks = out, lse, call.sinks
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=device)
        part_lses = torch.empty(splits, *out.shape[:2], dtype=torch.float32, device=device)
        sinks = None
    meta = call.metadata
    k_dim, v_dim = call.query.shape[2], out.shape[2]
    launch(_latent_kernel, (num_tiles, splits), call.query, call.k_cache, meta.cu_seqlens_q, meta.seq_lens,
           meta.block_table, sinks, parts, part_lses, *call.query.stride()[:2], call.k_cache.stride(0),
           call.k_cache.stride(3), meta.block_table.stride(0), first_seq, end_seq, num_rows, call.factors()[0],
           G=group, DV=v_dim, DR=k_dim - v_dim, DV_PAD=padded(v_dim), DR_PAD=padded(k_dim - v_dim),
           BLOCK_SIZE=call.k_cache.shape[3], ROWS=tile.rows, TILE=tile.positions, MIN_SPLIT=_MIN_SPLIT,
           TILES=0 if counted else triton.cdiv(max_q * group, tile.rows), WIDE=call.wide, num_warps=tile.num_warps,
           num_stages=tile.num_stages)  # fmt: skip
    if splits > 1:
        first = first_seq  # rows before belong to sequences of one token each
        merge_states(parts[:, first:], part_lses[:, first:], out[first:], sinks=call.sinks,
                     lse=None if lse is None else lse[first:])  # fmt: skip


def _tile(call: AttentionCall, rows: int) -> _Tile:
    """For sequences of up to `rows` rows. A tile of positions lies within one block."""
    name, block_size = arch(call.query.device), call.k_cache.shape[3]
    tiles = _TILES_OF_16 if rows <= 16 else _TILES_OF_MORE
    tile = _TILE_OF_FLOAT32 if call.wide else tiles.get("gfx" if name.startswith("gfx") else name, tiles["sm_90"])
    return tile._replace(positions=min(tile.positions, block_size & -block_size))


@triton.jit(do_not_specialize=("first_seq", "end_seq", "num_rows"))
def _latent_kernel(
    query, k_cache, cu_seqlens, seq_lens, block_table, sinks, out, lse,
    q_stride_t, q_stride_h, k_stride_n, k_stride_t, table_stride, first_seq, end_seq, num_rows, scale,
    G: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, DV_PAD: tl.constexpr, DR_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr, TILES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    tile, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if TILES:
        seq = first_seq + tile // TILES
        start = tl.load(cu_seqlens + seq)
        first_row = tile % TILES * ROWS
    else:
        # The last sequence whose first tile, were each before it to end with a tile of its own, is not behind ours.
        offset, seq, behind = tl.load(cu_seqlens + first_seq), first_seq, end_seq
        while behind - seq > 1:
            middle = (seq + behind) // 2
            if (tl.load(cu_seqlens + middle) - offset) * G // ROWS + middle - first_seq <= tile:
                seq = middle
            else:
                behind = middle
        start = tl.load(cu_seqlens + seq)
        first_row = (tile - (start - offset) * G // ROWS - (seq - first_seq)) * ROWS
    q_len = tl.load(cu_seqlens + seq + 1) - start
    if first_row >= q_len * G:
        return
    context = tl.load(seq_lens + seq) - q_len  # of a padding row -1: it sees nothing

    row = first_row + tl.arange(0, ROWS)
    token, head = row // G, row % G
    valid = token < q_len
    high = context + (tl.minimum(first_row + ROWS, q_len * G) - 1) // G + 1
    share = tl.maximum(tl.cdiv(tl.cdiv(high, num_splits), TILE) * TILE, MIN_SPLIT)
    low = split * share
    high = tl.minimum(high, low + share)
    last = tl.minimum(context + token, high - 1)  # position that a row sees

    q_c = load_query(query, start + token, head, valid, q_stride_t, q_stride_h, DV, DV_PAD)
    q_r = load_query(query + DV, start + token, head, valid, q_stride_t, q_stride_h, DR, DR_PAD)
    if WIDE:
        q_c, q_r = q_c.to(tl.float32), q_r.to(tl.float32)
    i = tl.arange(0, TILE)
    table = block_table + seq.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # A tile's block is looked up a round early: latents then wait for one load, not for two, and are read far ahead.
    block = tl.load(table + low // BLOCK_SIZE, mask=low < high, other=0)
    for first in tl.range(low, high, TILE, disable_licm=True):  # nothing hoisted: the sums need the registers
        j = first + i
        present = j < high
        latent = k_cache + block.to(tl.int64) * k_stride_n + first % BLOCK_SIZE * k_stride_t
        c = load_tile(latent, i * k_stride_t, 1, present, DV, DV_PAD, True).to(q_c.dtype)
        r = load_tile(latent + DV, i * k_stride_t, 1, present, DR, DR_PAD, True).to(q_c.dtype)
        block = tl.load(table + (first + TILE) // BLOCK_SIZE, mask=first + TILE < high, other=0)
        s = tl.dot(q_c, tl.trans(c), input_precision="ieee")
        s = tl.dot(q_r, tl.trans(r), s, input_precision="ieee") * scale
        s = tl.where(j[None, :] <= last[:, None], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
        weights = tl.exp2(s - shift[:, None])
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q_c.dtype), c, acc * fade[:, None], input_precision="ieee")
        peak = new_peak
    keep = valid
    if num_splits > 1:  # nobody reads the partial result of an empty split
        keep &= total != 0
    at = split.to(tl.int64) * num_rows + start
    finish_rows(acc, peak, total, out, lse, sinks, at + token, head, valid, keep, G, DV, DV_PAD)
