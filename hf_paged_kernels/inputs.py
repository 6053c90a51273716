"""From one packed list of integers to the tensors that all layers of a step share.

The host writes what it knows of a step into one int32 buffer, copies it to the device once, and `prepare_inputs` expands
it there into buffers whose addresses never change, as CUDA graphs need them. Letters: S sequences, T new tokens, G block
groups (layers that share a block table), R rows whose logits are wanted.

    packed = cu_seqlens [S+1] | context [S] | starts [G, S+1] | tokens [T] | rows [R] | tables

    cu_seqlens  where each sequence's tokens start among all T
    context     tokens of each sequence already in the cache
    starts      where each sequence's block table starts in `tables`; the last entry is where the group's end
    tokens      token ids; -1 - i stands for `sampled[i]`, a token that the host does not know yet
    rows        packed rows whose logits are wanted
    tables      the block tables, one after another, group by group; -1 for a block that is gone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops


class PackedSizes(NamedTuple):
    """What the host knows about a packed step without reading it again."""

    num_seqs: int
    num_tokens: int
    num_rows: int
    num_groups: int
    longest_new: int  # most new tokens of a sequence
    longest_table: int  # most blocks in a table

    @property
    def tokens_at(self) -> int:
        """Where `tokens` starts in the packed buffer."""
        return 2 * self.num_seqs + 1 + self.num_groups * (self.num_seqs + 1)

    @property
    def rows_at(self) -> int:
        return self.tokens_at + self.num_tokens

    @property
    def tables_at(self) -> int:
        return self.rows_at + self.num_rows


@dataclass(frozen=True)
class InputBuffers:
    """What a step is expanded into: the first S, T or R entries of buffers that may be larger.

    Attributes:
        input_ids, positions: int64 [T].
        rows: int64 [R].
        cu_seqlens: int32 [S+1].
        seq_lens: int32 [S], tokens of each sequence after the step.
        block_table: int32 [G, S, W], row by row; entries behind a sequence's last block keep what they held.
        slot_mapping: int64 [G, T], block * block_size + offset where each token is written; -1 where its block is gone.
    """

    input_ids: Tensor
    positions: Tensor
    rows: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


def prepare_inputs(
    packed: Tensor,
    sizes: PackedSizes,
    out: InputBuffers,
    *,
    block_size: int,
    padded_seqs: int | None = None,
    sampled: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Expand a packed step into `out`.

        position[t]          = context[s] + t - cu_seqlens[s]                 for the tokens t of sequence s
        slot_mapping[g, t]   = table[g, s, position // block_size] * block_size + position % block_size
        seq_lens[s]          = context[s] + cu_seqlens[s + 1] - cu_seqlens[s]

    Args:
        packed: int32, at least as long as `sizes` says; see this module.
        block_size: tokens per block.
        padded_seqs: fill up to so many sequences of one token, if all have one: token 0 at position 0, seq_len 0, written
            nowhere (slot -1); and as many rows, 0 each. Their block tables are left alone. None: no padding.
        sampled: int64, what entries below 0 of `tokens` stand for; without it they stay as they are.
        backend: see `ops`.
    """
    padded_seqs = sizes.num_seqs if padded_seqs is None else padded_seqs
    _check(packed, sizes, out, padded_seqs, sampled)
    if ops.resolve_backend(backend, packed.device) == "triton":
        from .triton.inputs import prepare_inputs as run
    else:
        from .ref.inputs import prepare_inputs as run
    run(packed, sizes, out, block_size=block_size, padded_seqs=padded_seqs, sampled=sampled)


def _check(packed: Tensor, sizes: PackedSizes, out: InputBuffers, padded_seqs: int, sampled: Tensor | None) -> None:
    if packed.dtype != torch.int32 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(f"packed must be a contiguous int32 vector, not {packed.dtype} {list(packed.shape)}")
    if len(packed) < sizes.tables_at:
        raise ValueError(f"packed has {len(packed)} entries, fewer than the {sizes.tables_at} of its sizes")
    padding = padded_seqs - sizes.num_seqs
    if padding < 0 or (padding and (sizes.longest_new != 1 or sizes.num_rows > padded_seqs)):
        raise ValueError(f"padded_seqs is {padded_seqs}: padding is for steps of one token a sequence, not for {sizes}")
    if sampled is not None and (sampled.dtype != torch.int64 or sampled.dim() != 1 or not sampled.is_contiguous()):
        raise ValueError(f"sampled must be a contiguous int64 vector, not {sampled.dtype} {list(sampled.shape)}")
    num_tokens, num_rows = sizes.num_tokens + padding, padded_seqs if padding else sizes.num_rows
    needs = {
        "input_ids": (torch.int64, (num_tokens,)),
        "positions": (torch.int64, (num_tokens,)),
        "rows": (torch.int64, (num_rows,)),
        "cu_seqlens": (torch.int32, (padded_seqs + 1,)),
        "seq_lens": (torch.int32, (padded_seqs,)),
        "block_table": (torch.int32, (sizes.num_groups, padded_seqs, sizes.longest_table)),
        "slot_mapping": (torch.int64, (sizes.num_groups, num_tokens)),
    }
    for name, (dtype, shape) in needs.items():
        tensor = getattr(out, name)
        fits = tensor.dim() == len(shape) and all(have >= need for have, need in zip(tensor.shape, shape))
        if tensor.dtype != dtype or not fits or not tensor.is_contiguous() or tensor.device != packed.device:
            raise ValueError(
                f"out.{name} must be contiguous {dtype} of at least {list(shape)} on {packed.device}, not "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
