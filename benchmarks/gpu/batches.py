"""Random paged batches: a cache whose blocks lie in random order, and the metadata of one step on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels import AttentionMetadata


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer. Values smaller than keys are the first part of those, as in latent attention."""

    query: int
    key_value: int
    key_dim: int
    value_dim: int

    @property
    def latent(self) -> bool:
        return self.value_dim < self.key_dim


def metadata(
    query_lens: Sequence[int], seq_lens: Sequence[int], block_size: int, device: torch.device, seed: int = 0
) -> AttentionMetadata:
    """One step in which sequence s gets its last `query_lens[s]` of `seq_lens[s]` tokens. Blocks 0 to N - 1 are used.

    Sequences with one new token must come first, as in a step of the engine.
    """
    counts = [-(-length // block_size) for length in seq_lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    table = torch.full((len(seq_lens), max(counts)), -1, dtype=torch.int32)
    slots = []
    start = 0
    for seq, (count, query_len, seq_len) in enumerate(zip(counts, query_lens, seq_lens, strict=True)):
        table[seq, :count] = order[start : start + count]
        positions = torch.arange(seq_len - query_len, seq_len)
        slots.append(table[seq, positions // block_size].long() * block_size + positions % block_size)
        start += count
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return AttentionMetadata(
        cu_seqlens_q=starts.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=table.to(device),
        slot_mapping=torch.cat(slots).to(device),
        max_seqlen_q=max(query_lens),
        max_seqlen_k=max(seq_lens),
        num_decodes=next((i for i, query_len in enumerate(query_lens) if query_len != 1), len(query_lens)),
    )


def num_blocks(seq_lens: Sequence[int], block_size: int) -> int:
    return sum(-(-length // block_size) for length in seq_lens)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Standard normal numbers, the same at every call with this seed on this kind of device."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)
