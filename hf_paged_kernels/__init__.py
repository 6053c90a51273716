"""Kernels of hf_paged: paged attention and what surrounds it. Imports torch only; see `ops` for the signatures."""

from .ops import (
    AttentionMetadata,
    allocate_kv,
    allocate_scales,
    attention_,
    copy_blocks,
    gather_kv,
    merge_states,
    resolve_backend,
    store_kv,
    supports,
    why_unsupported,
)

__all__ = [
    "AttentionMetadata",
    "allocate_kv",
    "allocate_scales",
    "attention_",
    "copy_blocks",
    "gather_kv",
    "merge_states",
    "resolve_backend",
    "store_kv",
    "supports",
    "why_unsupported",
]
