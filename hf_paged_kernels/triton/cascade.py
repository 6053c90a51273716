"""Decodes of sequences that begin with the same blocks: the shared keys are read once for all of them.

Attention over disjoint sets of keys can be merged by the logarithms of the sums, so a sequence's result is made of one
over the prefix that it shares and one over its own rest (Hydragen, arXiv 2402.05099). Over the prefix, the query rows of
all sequences of a group are one block of rows that no causal mask tells apart, as if they were heads of one sequence:
keys and values are read once per 64 of these rows instead of once per sequence. Both sets of keys are split over
programs as in `decode`, and one merge puts all partial results together: three launches, whatever there is to share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOG2_E, AttentionCall, attend_tile, finish_rows, load_query
from .decode import choose_num_splits, launch_decode, rows_of_programs, shape_of_programs
from .launch import launch, num_sms
from .merge import merge_states


@triton.jit(do_not_specialize=("num_groups", "num_rows"), do_not_specialize_on_alignment=("lse",))
def _prefix_kernel(
    query, k_cache, v_cache, k_scale, v_scale, seq_lens, block_table, members, group_starts, prefix_lens, slopes, out,
    lse, q_stride_t, q_stride_h, k_stride_n, k_stride_h, k_stride_d, k_stride_t, v_stride_n, v_stride_h, v_stride_t,
    scale_stride_n, scale_stride_h, table_stride, num_groups, num_rows, qk_scale, cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, kv_head, split, num_splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    # The last group whose first block of rows, were each before it to end with a block of its own, is not behind ours.
    group, behind = num_groups * 0, num_groups
    while behind - group > 1:
        middle = (group + behind) // 2
        if tl.load(group_starts + middle) * GROUP // BLOCK_M + middle <= block:
            group = middle
        else:
            behind = middle
    start = tl.load(group_starts + group)
    count = tl.load(group_starts + group + 1) - start
    first_row = (block - start * GROUP // BLOCK_M - group) * BLOCK_M
    if first_row >= count * GROUP:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    member, head = row // GROUP, kv_head * GROUP + row % GROUP
    valid = member < count
    seq = tl.load(members + start + member, mask=valid, other=0)
    positions = tl.where(valid, tl.load(seq_lens + seq) - 1, -1)  # behind every key of the prefix
    high = tl.load(prefix_lens + group)
    share = tl.cdiv(tl.cdiv(high, TILE), num_splits)
    begin = split * share
    end = tl.minimum(begin + share, tl.cdiv(high, TILE))

    q = load_query(query, seq, head, valid, q_stride_t, q_stride_h, DK, DK_PAD)
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
    table = block_table + tl.load(members + start).to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    MASKED: tl.constexpr = BLOCK_SIZE % TILE != 0  # else tiles end where blocks do, and every row sees all of them
    for first in tl.range(begin * TILE, end * TILE, TILE, disable_licm=True):  # hoisting would cost too many registers
        acc, peak, total = attend_tile(
            q, acc, peak, total, first, 0, high, positions, positions, slope, k_cache, v_cache, k_scale, v_scale, table,
            k_stride_n, k_stride_d, k_stride_t, v_stride_n, v_stride_t, scale_stride_n, qk_scale, cap,
            DK, DV, DK_PAD, DV_PAD, BLOCK_SIZE, TILE, SPAN, SOFTCAP, MASKED,
        )  # fmt: skip
    at = split.to(tl.int64) * num_rows + seq
    finish_rows(acc, peak, total, out, lse, None, at, head, valid, total != 0, NUM_HEADS, DV, DV_PAD)


def cascade(call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
    """Fill out [D, Hq, Dv] and lse [D, Hq] of the first D sequences, of one new token each, which share prefixes."""
    shared, num_seqs, device = call.metadata.shared, out.shape[0], out.device
    block_m, _ = rows_of_programs(call, shared.max_members)
    blocks = num_seqs * call.group // block_m + shared.num_groups  # at most
    tile, num_stages, num_warps, waves = shape_of_programs(call, device)
    programs = waves * num_sms(device)
    prefix_splits = choose_num_splits(blocks * call.num_kv_heads, shared.max_prefix, programs)
    rest_splits = choose_num_splits(num_seqs * call.num_kv_heads, shared.max_rest, programs)
    parts = torch.empty(rest_splits + prefix_splits, *out.shape, dtype=torch.float32, device=device)
    part_lses = torch.empty(parts.shape[:3], dtype=torch.float32, device=device)
    launch_decode(call, num_seqs, 1, rest_splits, parts[:rest_splits], part_lses[:rest_splits], starts=shared.starts)
    if call.v_cache.shape[2] % tile == 0:  # the look-up of a tile's block is a stage of its own, before each tile's
        num_stages = 2 * num_stages - 1
    launch(_prefix_kernel, (blocks, call.num_kv_heads, prefix_splits), call.query, call.k_cache, call.v_cache,
           call.k_scale, call.v_scale, call.metadata.seq_lens, call.metadata.block_table, shared.members,
           shared.group_starts, shared.prefix_lens, call.slopes, parts[rest_splits:], part_lses[rest_splits:],
           *call.strides(), shared.num_groups, num_seqs, *call.factors(), **call.constants(), BLOCK_M=block_m,
           TILE=tile, num_warps=num_warps, num_stages=num_stages)  # fmt: skip
    merge_states(parts, part_lses, out, sinks=call.sinks, lse=lse)
