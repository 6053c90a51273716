"""What one step's batch looks like to the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import check_index


@dataclass(eq=False)
class AttentionMetadata:
    """What one step's batch looks like; made once a step (per block group) and used by every layer.

    All tensors are contiguous and on the cache's device. They may be refilled in place between steps. A sequence of
    length 0 with one row is padding: its slot should be -1, and its result is zeros (not with the C++ kernels).

    Attributes:
        cu_seqlens_q: int32 [S+1], where each sequence's rows start in the packed batch; from 0 to T.
        seq_lens: int32 [S], tokens of each sequence after this step (cached and new).
        block_table: int32 [S, B], block of each `block_size` positions; -1 where no query of the step may look.
        slot_mapping: int64 [T], block * block_size + offset where each token is written; -1: not written.
        max_seqlen_q: the most new tokens of any sequence.
        max_seqlen_k: the longest sequence, or a bound on its length.
        num_decodes: how many of the first sequences are known to have exactly one new token. They get a kernel of their
            own where others have many.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_decodes: int = 0
    _launch: dict = field(default_factory=dict, init=False, repr=False)  # a backend's own per-step preparation

    def __post_init__(self):
        check_index("cu_seqlens_q", self.cu_seqlens_q, torch.int32, 1)
        check_index("seq_lens", self.seq_lens, torch.int32, 1)
        check_index("block_table", self.block_table, torch.int32, 2)
        check_index("slot_mapping", self.slot_mapping, torch.int64, 1)
        num_seqs = self.seq_lens.shape[0]
        if self.cu_seqlens_q.shape[0] != num_seqs + 1:
            raise ValueError(f"cu_seqlens_q has {self.cu_seqlens_q.shape[0]} entries, not {num_seqs} sequences + 1")
        if self.block_table.shape[0] != num_seqs:
            raise ValueError(f"block_table has {self.block_table.shape[0]} rows for {num_seqs} sequences")
        # Of the other sequences each has at most max_seqlen_q of the remaining tokens.
        others, rest = num_seqs - self.num_decodes, self.slot_mapping.shape[0] - self.num_decodes
        if not 0 <= self.num_decodes <= num_seqs or not 0 <= rest <= others * self.max_seqlen_q:
            raise ValueError(f"num_decodes {self.num_decodes} is impossible with {num_seqs} sequences of at most "
                             f"{self.max_seqlen_q} and together {self.slot_mapping.shape[0]} tokens")  # fmt: skip

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
