"""Expanding a packed step into a step's tensors: one launch where torch would need dozens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import InputBuffers, PackedSizes
from .launch import launch

_CHUNK = 512  # entries a program writes of each output: a decode is one program a sequence, a long prompt several

# Sizes differ from step to step: specialised on, each new pattern of multiples of 16 would be compiled anew.
_VARYING = (
    *("sampled", "num_seqs", "num_rows", "tokens_at", "rows_at", "tables_at", "padded_seqs", "padded_rows"),
    *("group_stride", "seq_stride", "slot_stride"),
)


@triton.jit(do_not_specialize=_VARYING)
def _prepare_inputs_kernel(
    packed, sampled, input_ids, positions, rows, cu_seqlens, seq_lens, block_table, slot_mapping,
    num_seqs, num_rows, tokens_at, rows_at, tables_at, padded_seqs, padded_rows, group_stride, seq_stride, slot_stride,
    BLOCK_SIZE: tl.constexpr, NUM_GROUPS: tl.constexpr, HAS_SAMPLED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (s, c): the c-th CHUNK of sequence s; behind the sequences, of the padding; behind that, of the rows."""
    seq = tl.program_id(0)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    if seq == padded_seqs:
        row = tl.load(packed + rows_at + at, mask=at < num_rows, other=0)
        tl.store(rows + at, row.to(tl.int64), mask=at < padded_rows)
    elif seq >= num_seqs:  # padding: one token that is read and written nowhere
        tl.store(cu_seqlens + seq + 1, seq + 1)
        tl.store(seq_lens + seq, 0)
        tl.store(input_ids + seq, 0)
        tl.store(positions + seq, 0)
        for group in tl.static_range(NUM_GROUPS):
            tl.store(slot_mapping + group * slot_stride + seq, -1)
    else:
        start = tl.load(packed + seq)
        stop = tl.load(packed + seq + 1)
        context = tl.load(packed + num_seqs + 1 + seq)
        if seq == 0:
            tl.store(cu_seqlens, 0)
        tl.store(cu_seqlens + seq + 1, stop)
        tl.store(seq_lens + seq, context + stop - start)

        new = at < stop - start
        token = tl.load(packed + tokens_at + start + at, mask=new, other=0).to(tl.int64)
        if HAS_SAMPLED:
            unknown = token < 0
            token = tl.where(unknown, tl.load(sampled + (-1 - token), mask=new & unknown, other=0), token)
        position = context + at
        tl.store(input_ids + start + at, token, mask=new)
        tl.store(positions + start + at, position.to(tl.int64), mask=new)

        for group in tl.static_range(NUM_GROUPS):
            bounds = packed + 2 * num_seqs + 1 + group * (num_seqs + 1) + seq
            first = tl.load(bounds)
            table = packed + tables_at + first
            inside = at < tl.load(bounds + 1) - first
            line = block_table + tl.cast(group, tl.int64) * group_stride + tl.cast(seq, tl.int64) * seq_stride
            tl.store(line + at, tl.load(table + at, mask=inside, other=0), mask=inside)
            block = tl.load(table + position // BLOCK_SIZE, mask=new, other=-1).to(tl.int64)
            slot = tl.where(block < 0, -1, block * BLOCK_SIZE + position % BLOCK_SIZE)
            tl.store(slot_mapping + group * slot_stride + start + at, slot, mask=new)


def prepare_inputs(
    packed: Tensor, sizes: PackedSizes, out: InputBuffers, *, block_size: int, padded_seqs: int, sampled: Tensor | None
) -> None:
    """See `inputs.prepare_inputs`, which checks the arguments."""
    padded_rows = padded_seqs if padded_seqs > sizes.num_seqs else sizes.num_rows
    grid = (padded_seqs + 1, triton.cdiv(max(sizes.longest_new, sizes.longest_table, padded_rows, 1), _CHUNK))
    launch(
        _prepare_inputs_kernel, grid, packed, packed if sampled is None else sampled, out.input_ids, out.positions,
        out.rows, out.cu_seqlens, out.seq_lens, out.block_table, out.slot_mapping, sizes.num_seqs, sizes.num_rows,
        sizes.tokens_at, sizes.rows_at, sizes.tables_at, padded_seqs, padded_rows, out.block_table.stride(0),
        out.block_table.stride(1), out.slot_mapping.stride(0), BLOCK_SIZE=block_size, NUM_GROUPS=sizes.num_groups,
        HAS_SAMPLED=sampled is not None, CHUNK=_CHUNK,
    )  # fmt: skip
