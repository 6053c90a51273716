"""Attention of few query rows per sequence (decodes, short speculative runs) with the keys split over programs.

A program takes one sequence, one KV head and one of `num_splits` runs of its keys; its rows are the (token, query head)
pairs of that KV head, so that keys and values are read once for all of them. The grid is static: where the splits lie is
computed from `seq_lens` on the device, so that a captured launch stays right when lengths change. A split without keys
contributes nothing. With several splits the programs write partial results, which `merge.merge_states` puts together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOG2_E, AttentionCall, attend_tile, finish_rows, generation, load_query, lowest_seen
from .launch import arch, launch, num_sms, tuned
from .merge import merge_states

MAX_ROWS = 64  # of a program: beyond this the prefill kernel's larger tiles serve better
_MAX_SPLITS = 128
_MIN_SPLIT = 256  # keys: below this a program's fixed cost outweighs its share of the reading
_TILES_IN_FLIGHT = {"sm_80": 80 << 10, "sm_90": 104 << 10}  # bytes: two programs fit a multiprocessor's shared memory
_WAVES = 4  # programs per multiprocessor to aim for: two fit at a time, more of them even out unequal lengths


@triton.jit(do_not_specialize=("num_rows", "span", "split_tiles"))
def _decode_kernel(
    query, k_cache, v_cache, k_scale, v_scale, cu_seqlens, seq_lens, block_table, sinks, slopes, out, lse, starts,
    q_stride_t, q_stride_h, k_stride_n, k_stride_h, k_stride_d, k_stride_t, v_stride_n, v_stride_h, v_stride_t,
    scale_stride_n, scale_stride_h, table_stride, num_rows, span, split_tiles, qk_scale, cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    seq, split, num_splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    kv_head, first_row = tl.program_id(1) % NUM_KV_HEADS, tl.program_id(1) // NUM_KV_HEADS * BLOCK_M
    start = tl.load(cu_seqlens + seq)
    q_len = tl.load(cu_seqlens + seq + 1) - start
    if first_row >= q_len * GROUP:
        return
    context = tl.load(seq_lens + seq) - q_len  # of a padding row -1: it sees nothing

    row = first_row + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = token < q_len
    positions = tl.where(valid, context + token, -1)
    lowest = lowest_seen(positions, span, SPAN)
    low = lowest_seen(context + first_row // GROUP, span, SPAN)
    high = context + tl.minimum(q_len, (first_row + BLOCK_M + GROUP - 1) // GROUP)
    begin, end = low // TILE, tl.cdiv(high, TILE)
    if starts is not None:  # whole blocks of keys are left out
        first_key = tl.load(starts + seq)
        begin = tl.maximum(begin, first_key // TILE)
        if BLOCK_SIZE % TILE != 0:  # a tile may begin before them
            low = tl.maximum(low, first_key)
    if split_tiles > 0:  # pinned: the same sums whatever the batch
        begin, end = tl.maximum(begin, split * split_tiles), tl.minimum(end, (split + 1) * split_tiles)
    else:
        share = tl.cdiv(tl.maximum(end - begin, 0), num_splits)
        begin += split * share
        end = tl.minimum(begin + share, end)

    q = load_query(query, start + token, head, valid, q_stride_t, q_stride_h, DK, DK_PAD)
    if WIDE:
        q = q.to(tl.float32)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    k_cache += kv_head.to(tl.int64) * k_stride_h
    v_cache += kv_head.to(tl.int64) * v_stride_h
    if k_scale is not None:
        k_scale += kv_head * scale_stride_h
        v_scale += kv_head * scale_stride_h
    table = block_table + seq.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin * TILE, end * TILE, TILE):  # bound by memory: one loop, masks everywhere
        acc, peak, total = attend_tile(
            q, acc, peak, total, first, low, high, positions, lowest, slope, k_cache, v_cache, k_scale, v_scale, table,
            k_stride_n, k_stride_d, k_stride_t, v_stride_n, v_stride_t, scale_stride_n, qk_scale, cap,
            DK, DV, DK_PAD, DV_PAD, BLOCK_SIZE, TILE, SPAN, SOFTCAP, True,
        )  # fmt: skip
    keep = valid
    if num_splits > 1:  # nobody reads the partial result of an empty split
        keep &= total != 0
    partial_row = split.to(tl.int64) * num_rows + start
    finish_rows(acc, peak, total, out, lse, sinks, partial_row + token, head, valid, keep, NUM_HEADS, DV, DV_PAD)


def decode(
    call: AttentionCall, num_seqs: int, max_q: int, out: Tensor, lse: Tensor | None, split_size: int | None
) -> None:
    """Fill out [R, Hq, Dv] and lse [R, Hq] of the first `num_seqs` sequences: R rows, at most `max_q` of any.

    With `split_size`, splits have that many keys (rounded up to whole tiles), counted from position 0.
    """
    device = out.device
    _, heads = rows_of_programs(call, max_q)
    tile, _, _, waves = shape_of_programs(call, device)
    longest = call.metadata.max_seqlen_k
    if split_size is not None:
        split_tiles = triton.cdiv(split_size, tile)
        num_splits = max(1, triton.cdiv(longest, split_tiles * tile))
    else:
        split_tiles = 0
        keys = longest if call.kind == "all" else min(longest, call.span + max_q)
        num_splits = choose_num_splits(num_seqs * heads, keys, waves * num_sms(device))
    parts, part_lses, sinks = out, lse, call.sinks
    if num_splits > 1:
        parts = torch.empty(num_splits, *out.shape, dtype=torch.float32, device=device)
        part_lses = torch.empty(num_splits, *out.shape[:2], dtype=torch.float32, device=device)
        sinks = None
    launch_decode(call, num_seqs, max_q, num_splits, parts, part_lses, sinks=sinks, split_tiles=split_tiles)
    if num_splits > 1:
        merge_states(parts, part_lses, out, sinks=call.sinks, lse=lse)


def launch_decode(
    call: AttentionCall, num_seqs: int, max_q: int, num_splits: int, parts: Tensor, part_lses: Tensor | None, *,
    sinks: Tensor | None = None, split_tiles: int = 0, starts: Tensor | None = None,
) -> None:  # fmt: skip
    """One launch of the kernel, into parts [num_splits, R, Hq, Dv], or [R, Hq, Dv] for one split, and their LSEs.

    Args:
        starts: int32 [num_seqs], keys of each sequence to leave out, from its first on.
    """
    block_m, heads = rows_of_programs(call, max_q)
    tile, num_stages, num_warps, _ = shape_of_programs(call, parts.device)
    launch(_decode_kernel, (num_seqs, heads, num_splits), *call.tensors(), sinks, call.slopes, parts, part_lses, starts,
           *call.strides(), parts.shape[-3], call.span, split_tiles, *call.factors(), **call.constants(),
           BLOCK_M=block_m, TILE=tile, num_warps=num_warps, num_stages=num_stages)  # fmt: skip


def rows_of_programs(call: AttentionCall, max_q: int) -> tuple[int, int]:
    """(rows of a program, programs of a sequence's split) for at most `max_q` new tokens."""
    block_m = min(MAX_ROWS, max(16, triton.next_power_of_2(max_q * call.group)))
    return block_m, call.num_kv_heads * triton.cdiv(max_q * call.group, block_m)


def shape_of_programs(call: AttentionCall, device: torch.device) -> tuple[int, int, int, int]:
    """(keys of a tile, tiles in flight, warps, programs per multiprocessor to aim for)"""
    tile, num_stages = tile_and_stages(call, arch(device))
    return tuned("decode", tile=tile, num_stages=num_stages, num_warps=4, waves=_WAVES)


def choose_num_splits(num_programs: int, num_keys: int, wanted_programs: int) -> int:
    """Into how many runs the keys of each sequence are cut, so that `num_programs` times as many are those wanted."""
    wanted = triton.cdiv(wanted_programs, num_programs)
    return max(1, min(wanted, triton.cdiv(num_keys, _MIN_SPLIT), _MAX_SPLITS))


def tile_and_stages(call: AttentionCall, arch: str) -> tuple[int, int]:
    """Keys of a tile, 32 KiB of them and their values where 16 to 128 can be, and stages of the loop over tiles.

    The largest that spill no registers (tests/gpu/compile_kernels.py).
    """
    kind = generation(arch)
    amd = kind == "gfx"
    most, size = (32, 16 << 10) if amd else (128, 32 << 10 if call.k_scale is None else 16 << 10)  # 8 bits become 16
    tile = min(most, max(16, 1 << (size // call.key_bytes).bit_length() - 1))
    block_size = call.v_cache.shape[2]
    if block_size in (64, 128):  # then a tile lies in one block
        tile = min(tile, block_size)
    elif block_size % tile:  # a pointer for every key: larger tiles spill registers
        tile = min(tile, 64)
    if call.wide and kind == "sm_90":
        tile = 16
    if amd:  # scalar registers are few: scales and addresses of several blocks leave no room for more
        return (16 if call.k_scale is not None or block_size % tile else tile), 2
    in_flight = max(1, min(3, _TILES_IN_FLIGHT[kind] // (tile * call.key_bytes)))
    # While one stage computes the others load; a look-up for every key takes two stages before its loads can begin.
    return tile, 1 + in_flight + (2 if block_size % tile else 0)
