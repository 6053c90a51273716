"""What one step's batch looks like to the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_index


@dataclass(eq=False)
class SharedPrefixes:
    """Decodes of a step whose first blocks are the same.

    The first D sequences of a batch, which have one new token each, are told apart into G groups. Those that share
    nothing are a group, too, with a prefix of no keys.

    Attributes:
        members: int32 [D], the sequences group by group.
        group_starts: int32 [G + 1], where each group's members start; from 0 to D.
        prefix_lens: int32 [G], keys that a group's members share, whole blocks of them.
        starts: int32 [D], the same for each sequence: how many of its keys are shared.
        max_members: the most members of a group with a prefix.
        max_prefix: the longest prefix.
        max_rest: the most keys that a sequence has behind its prefix, or a bound on them.
    """

    members: Tensor
    group_starts: Tensor
    prefix_lens: Tensor
    starts: Tensor
    max_members: int
    max_prefix: int
    max_rest: int

    def __post_init__(self):
        for name in ("members", "group_starts", "prefix_lens", "starts"):
            check_index(name, getattr(self, name), torch.int32, 1)
        if len(self.members) != len(self.starts) or len(self.group_starts) != len(self.prefix_lens) + 1:
            counts = [len(x) for x in (self.members, self.starts, self.group_starts, self.prefix_lens)]
            raise ValueError(f"members, starts, group_starts and prefix_lens have {counts} entries, not D, D, G + 1, G")

    @property
    def num_groups(self) -> int:
        return len(self.prefix_lens)


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
        ends: int32 [T], how many keys of its sequence each row sees, where it is more than those up to itself: of images whose
            tokens see each other. None: no row sees further. Never of the first `num_decodes` sequences' rows.
        shared: what the first `num_decodes` sequences are known to share, and had before this step. The result is the same
            without: bit for bit with the C++ kernels, which read whole `SHARED_UNIT` keys once; the Triton kernels do so
            where every position is seen.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_decodes: int = 0
    shared: SharedPrefixes | None = None
    ends: Tensor | None = None

    def __post_init__(self):
        check_index("cu_seqlens_q", self.cu_seqlens_q, torch.int32, 1)
        check_index("seq_lens", self.seq_lens, torch.int32, 1)
        check_index("block_table", self.block_table, torch.int32, 2)
        check_index("slot_mapping", self.slot_mapping, torch.int64, 1)
        if self.ends is not None:
            check_index("ends", self.ends, torch.int32, 1)
            if self.ends.shape != self.slot_mapping.shape:
                raise ValueError(f"ends has {self.ends.shape[0]} entries, slot_mapping {self.slot_mapping.shape[0]}")
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

        if self.shared is not None and len(self.shared.members) != self.num_decodes:
            raise ValueError(f"shared has {len(self.shared.members)} members, num_decodes is {self.num_decodes}")

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
