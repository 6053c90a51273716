"""Expanding a packed step in plain torch, on any device, without waiting for it. See `hf_paged_kernels.inputs`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import InputBuffers, PackedSizes


def prepare_inputs(
    packed: Tensor, sizes: PackedSizes, out: InputBuffers, *, block_size: int, padded_seqs: int, sampled: Tensor | None
) -> None:
    """See `inputs.prepare_inputs`, which checks the arguments."""
    num_seqs, num_tokens, num_rows, num_groups = sizes[:4]
    cu_seqlens, context = packed[: num_seqs + 1], packed[num_seqs + 1 : 2 * num_seqs + 1]
    starts = packed[2 * num_seqs + 1 : sizes.tokens_at].view(num_groups, num_seqs + 1).long()
    tokens = packed[sizes.tokens_at : sizes.rows_at].long()
    tables = packed[sizes.tables_at :]
    if sampled is not None:
        tokens = torch.where(tokens < 0, sampled[(-1 - tokens).clamp(min=0)], tokens)

    num_new = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(num_seqs, device=packed.device), num_new, output_size=num_tokens)
    positions = torch.arange(num_tokens, device=packed.device) - cu_seqlens[sequence] + context[sequence]
    column = torch.arange(sizes.longest_table, device=packed.device)
    for group in range(num_groups):
        first, end = starts[group, :-1, None], starts[group, 1:, None]
        inside = column < end - first
        entries = tables[torch.where(inside, first + column, 0)]
        place = out.block_table[group, :num_seqs, : sizes.longest_table]
        place.copy_(torch.where(inside, entries, place))
        blocks = tables[starts[group, sequence] + positions // block_size].long()
        slots = blocks * block_size + positions % block_size
        out.slot_mapping[group, :num_tokens] = torch.where(blocks < 0, -1, slots)

    out.input_ids[:num_tokens] = tokens
    out.positions[:num_tokens] = positions
    out.rows[:num_rows] = packed[sizes.rows_at : sizes.tables_at]
    out.cu_seqlens[: num_seqs + 1] = cu_seqlens
    out.seq_lens[:num_seqs] = context + num_new
    if padded_seqs > num_seqs:
        for tensor in (out.input_ids, out.positions, out.seq_lens):
            tensor[num_seqs:padded_seqs] = 0
        out.rows[num_rows:padded_seqs] = 0
        out.slot_mapping[:, num_seqs:padded_seqs] = -1
        out.cu_seqlens[num_seqs + 1 : padded_seqs + 1] = torch.arange(num_seqs + 1, padded_seqs + 1, device=packed.device)
