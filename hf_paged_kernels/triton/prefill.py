"""Attention of prompts: tiles of 64 or 128 query rows, large enough for the matrix units (wgmma on Hopper).

A program takes BLOCK_M rows of one sequence and KV head, which are (token, query head) pairs. Nothing on the host knows
the lengths: the grid is an upper bound on the number of tiles, a program finds its sequence by binary search in
`cu_seqlens_q`, and those that find none end at once. The last tiles of a sequence, which see the most keys, come first.
Keys that every row sees go through a loop without masks; the tiles at the diagonal and at a window's or chunk's lower
edge through a second one. Keys that no row sees are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOG2_E, AttentionCall, attend_tile, finish_rows, generation, load_query, lowest_seen
from .launch import arch, launch, tuned

# Largest padded head size -> (BLOCK_M, TILE, num_warps, num_stages). wgmma takes 64 rows of each four warps.
_TILES = {
    "sm_80": [(64, (128, 64, 8, 2)), (128, (128, 32, 8, 2)), (256, (64, 32, 8, 2)), (512, (32, 16, 4, 2))],
    "sm_90": [(128, (128, 64, 8, 3)), (256, (128, 32, 8, 2)), (512, (32, 16, 4, 2))],
    "gfx": [(64, (128, 16, 4, 2)), (256, (64, 16, 4, 2)), (512, (32, 16, 4, 2))],
}
_QUANTIZED_TILES = _TILES | {
    "sm_80": [(256, (64, 32, 8, 2)), (512, (32, 16, 4, 2))],
    "gfx": [(256, (64, 16, 4, 2)), (512, (32, 16, 4, 2))],
}
# Products in float32 go without the matrix units on NVIDIA.
_WIDE_TILES = {
    "sm_80": [(256, (32, 32, 8, 2)), (512, (16, 16, 8, 2))],
    "sm_90": [(256, (32, 16, 8, 2)), (512, (16, 16, 8, 2))],
    "gfx": [(128, (64, 16, 8, 2)), (256, (32, 16, 4, 2)), (512, (16, 16, 4, 2))],
}


@triton.jit(do_not_specialize=("first_seq", "num_seqs", "num_tiles", "span"))
def _prefill_kernel(
    query, k_cache, v_cache, k_scale, v_scale, cu_seqlens, seq_lens, block_table, ends, sinks, slopes, out, lse,
    q_stride_t, q_stride_h, k_stride_n, k_stride_h, k_stride_d, k_stride_t, v_stride_n, v_stride_h, v_stride_t,
    scale_stride_n, scale_stride_h, table_stride, first_seq, num_seqs, num_tiles, span, qk_scale, cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # of a KV head's query heads: one unless they exceed BLOCK_M
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    part, tile = tl.program_id(0) % (NUM_KV_HEADS * PARTS), num_tiles - 1 - tl.program_id(0) // (NUM_KV_HEADS * PARTS)
    kv_head, first_head = part % NUM_KV_HEADS, part // NUM_KV_HEADS * HEADS

    # The last sequence whose first tile, were every sequence before it to end with a tile of its own, is not behind ours.
    offset = tl.load(cu_seqlens + first_seq)
    seq, behind = first_seq, num_seqs
    while behind - seq > 1:
        middle = (seq + behind) // 2
        if (tl.load(cu_seqlens + middle) - offset) // TOKENS + middle - first_seq <= tile:
            seq = middle
        else:
            behind = middle
    start = tl.load(cu_seqlens + seq)
    q_len = tl.load(cu_seqlens + seq + 1) - start
    first_token = (tile - (start - offset) // TOKENS - (seq - first_seq)) * TOKENS
    if first_token >= q_len:
        return
    context = tl.load(seq_lens + seq) - q_len

    row = tl.arange(0, BLOCK_M)
    token, head = first_token + row // HEADS, first_head + row % HEADS
    valid = (token < q_len) & (row < TOKENS * HEADS) & (head < GROUP)
    head += kv_head * GROUP
    positions = tl.where(valid, context + token, -1)
    lowest = lowest_seen(positions, span, SPAN)
    first_position = context + first_token
    last_position = context + tl.minimum(first_token + TOKENS, q_len) - 1
    low, high = lowest_seen(first_position, span, SPAN), last_position + 1
    last_seen = positions  # of each row
    if ends is not None:  # rows of images see to the image's end
        last_seen = tl.maximum(positions, tl.load(ends + start + token, mask=valid, other=0) - 1)
        high = tl.maximum(high, tl.max(last_seen, 0) + 1)
    # Tiles of which every row sees all: from the last row's lower edge to the first row's own position.
    full_begin = tl.cdiv(lowest_seen(last_position, span, SPAN), TILE)
    full_end = tl.maximum((first_position + 1) // TILE, full_begin)
    if EXACT:  # all tiles in ascending order, whichever rows share the program
        full_begin = low // TILE
        full_end = full_begin

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
    for first in range(full_begin * TILE, full_end * TILE, TILE):
        acc, peak, total = attend_tile(
            q, acc, peak, total, first, low, high, last_seen, lowest, slope, k_cache, v_cache, k_scale, v_scale, table,
            k_stride_n, k_stride_d, k_stride_t, v_stride_n, v_stride_t, scale_stride_n, qk_scale, cap,
            DK, DV, DK_PAD, DV_PAD, BLOCK_SIZE, TILE, SPAN, SOFTCAP, False,
        )  # fmt: skip
    for edge in range(low // TILE, tl.cdiv(high, TILE) - (full_end - full_begin)):
        first = tl.where(edge < full_begin, edge, edge + full_end - full_begin) * TILE
        acc, peak, total = attend_tile(
            q, acc, peak, total, first, low, high, last_seen, lowest, slope, k_cache, v_cache, k_scale, v_scale, table,
            k_stride_n, k_stride_d, k_stride_t, v_stride_n, v_stride_t, scale_stride_n, qk_scale, cap,
            DK, DV, DK_PAD, DV_PAD, BLOCK_SIZE, TILE, SPAN, SOFTCAP, True,
        )  # fmt: skip
    finish_rows(acc, peak, total, out, lse, sinks, start + token, head, valid, valid, NUM_HEADS, DV, DV_PAD)


def prefill(call: AttentionCall, first_seq: int, out: Tensor, lse: Tensor | None, *, exact: bool = False) -> None:
    """Fill the rows of the sequences from `first_seq` on in out [T, Hq, Dv] and lse [T, Hq].

    The sequences before have one row each. `exact`: a row's keys are summed in one order, whatever rows are beside it.
    """
    num_seqs = call.metadata.num_seqs
    block_m, tile, num_warps, num_stages = tile_shape(call, arch(out.device))
    block_m, tile, num_warps, num_stages = tuned(
        "prefill", block_m=block_m, tile=tile, num_warps=num_warps, num_stages=num_stages
    )
    heads = min(call.group, block_m)
    num_tiles = (len(out) - first_seq) // (block_m // heads) + num_seqs - first_seq
    parts = call.num_kv_heads * triton.cdiv(call.group, heads)
    launch(_prefill_kernel, (num_tiles * parts,), *call.tensors(), call.metadata.ends, call.sinks, call.slopes, out, lse, *call.strides(),
           first_seq, num_seqs, num_tiles, call.span, *call.factors(), **call.constants(), BLOCK_M=block_m, TILE=tile,
           HEADS=heads, EXACT=exact, num_warps=num_warps, num_stages=num_stages)  # fmt: skip


def tile_shape(call: AttentionCall, arch: str) -> tuple[int, int, int, int]:
    """(BLOCK_M, TILE, num_warps, num_stages): the largest tiles that spill no registers (tests/gpu/compile_kernels.py)."""
    constants = call.constants()
    width = max(constants["DK_PAD"], constants["DV_PAD"])
    tiles = _WIDE_TILES if call.wide else _TILES if call.k_scale is None else _QUANTIZED_TILES
    shapes = tiles[generation(arch)]
    block_m, tile, num_warps, num_stages = next(shape for limit, shape in shapes if width <= limit)
    if arch.startswith("gfx") and constants["BLOCK_SIZE"] % tile:  # as in `decode.tile_and_stages`
        block_m, tile = min(64, block_m), 16
    return block_m, tile, num_warps, num_stages
