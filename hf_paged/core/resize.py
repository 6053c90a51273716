"""What a smaller cache means for those who hold blocks, and for those who want some."""

from __future__ import annotations

from ..base.errors import CacheFull
from .held import HeldSequences
from .planner import Planner
from .request import Request
from .tables import BlockTables


def why_too_large(tables: BlockTables, request: Request, max_blocks: list[int], max_model_len: int) -> str | None:
    """Why `request` could never run with `max_blocks` blocks a group; None if it could."""
    for group, (need, most) in enumerate(zip(tables.most_blocks(request, max_model_len), max_blocks, strict=True)):
        if need > most:
            return (
                f"prompt of {len(request.prompt_token_ids)} tokens with max_tokens {request.max_tokens} and n {request.n} "
                f"can take {need} KV blocks of {tables.block_size} tokens in group {group}, but the cache holds at most "
                f"{most}; raise kv_cache_memory, or lower max_tokens or n"
            )
    return None


def make_room(tables: BlockTables, held: HeldSequences, planner: Planner, max_blocks: list[int]) -> None:
    """Take blocks from sequences, last in order first, until no more than `max_blocks` of a group are in use.

    Raises CacheFull, and takes nothing, if rows that nobody could compute again have more.
    """
    for count, most in zip(held.num_kept(), max_blocks):
        if count > most:
            raise CacheFull(
                f"rows of generate, or a cache it returned, hold {count} KV blocks that cannot be computed again, and "
                f"there would be {most}; let it end, or delete the cache, first"
            )
    while any(pool.num_in_use > most for pool, most in zip(tables.pools, max_blocks, strict=True)):
        # (swapped out nothing is: what is to be copied must not move)
        if not (held.empty_one() or planner.preempt_last(may_swap=False) or held.empty_pinned()):
            raise AssertionError("blocks are in use, but by nobody")
