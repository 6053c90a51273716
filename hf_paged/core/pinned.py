"""Prefixes whose keys and values came from outside, and stay in the cache: found and shared as any, evicted as none.

They yield last of all: when a sequence that runs alone, or the next to run, finds no blocks without theirs. So they
may take room, but stop nobody for good. What was theirs is then an ordinary cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from ..base.errors import CacheFull
from .blocks import BlockPool
from .plan import TierMoves
from .prefix import extend_keys
from .request import MediaSpan, Sequence
from .tables import RELEASED, BlockTables, TableChanges


@dataclass(slots=True)
class Filling:
    """What is to be done for a pinned prefix, as a step of its own.

    Attributes:
        new: per group, (place in its table, block) of those to be written.
        num_blocks: per group, blocks the cache must have for it.
        moves: what moves to host memory before.
        step: its number.
    """

    sequence: Sequence
    new: list[list[tuple[int, int]]]
    num_blocks: list[int]
    moves: TierMoves | None
    step: int


def find(
    tables: BlockTables, token_ids: AbstractSequence[int], cache_salt: str | bytes | None, adapter: int,
    media: AbstractSequence[MediaSpan],
) -> tuple[list[int], list[list[int]]] | None:  # fmt: skip
    """(first block, the blocks from there on) per group of a cached prefix of whole blocks; None if not all are there.

    A sliding group has the blocks that the next token sees, and those that the one a block earlier saw, if they are there.
    """
    block_size, keys = tables.block_size, []
    count = len(token_ids) // block_size
    extend_keys(keys, token_ids, count, block_size, cache_salt, adapter, media)
    firsts, found = [], []
    for pool, group in zip(tables.pools, tables.groups, strict=True):
        needed = group.num_unseen_blocks(count * block_size, block_size)
        blocks = [pool.lookup(key) for key in keys[needed:]]
        if None in blocks:
            return None
        first, least = needed, group.num_unseen_blocks((count - 1) * block_size, block_size)
        while first > least and (block := pool.lookup(keys[first - 1])) is not None:
            first -= 1
            blocks.insert(0, block)
        firsts.append(first)
        found.append(blocks)
    return firsts, found


def pin(
    tables: BlockTables,
    sequence: Sequence,
    token_ids: AbstractSequence[int],
    first_blocks: AbstractSequence[int],
    make_room: Callable[[], bool],
    step: int,
) -> Filling:
    """Let the empty `sequence` hold the blocks of `token_ids` from `first_blocks` on: cached ones, and new ones.

    Raises CacheFull, and holds nothing, if `make_room` cannot help.
    """
    request, block_size = sequence.request, tables.block_size
    count = len(token_ids) // block_size
    sequence.token_ids, sequence.num_prompt = list(token_ids), len(token_ids)
    seeds = request.cache_salt, request.adapter, request.media
    extend_keys(sequence.block_keys, sequence.token_ids, count, block_size, *seeds)
    held = [_take(pool, sequence.block_keys[first:]) for pool, first in zip(tables.pools, first_blocks, strict=True)]
    while any(blocks.count(None) > pool.num_free for pool, blocks in zip(tables.pools, held, strict=True)):
        if not make_room():
            for pool, blocks in zip(tables.pools, held, strict=True):
                for block in blocks:
                    if block is not None:
                        pool.release(block)
            raise CacheFull(
                f"{request.request_id}: {count} blocks of keys and values do not fit into the cache beside what cannot give "
                "way; raise kv_cache_memory"
            )
    new = []
    for pool, blocks, first in zip(tables.pools, held, first_blocks, strict=True):
        lacking = [place for place, block in enumerate(blocks) if block is None]
        for place in lacking:
            blocks[place] = pool.allocate()
        new.append([(first + place, blocks[place]) for place in lacking])
    sequence.block_tables = [[RELEASED] * first + blocks for first, blocks in zip(first_blocks, held, strict=True)]
    sequence.num_computed = count * block_size
    moves = TableChanges(len(tables.pools)).take_moves(tables.host, step)
    return Filling(sequence, new, [pool.num_blocks for pool in tables.pools], moves, step)


def publish(tables: BlockTables, filling: Filling) -> None:
    """What was new is written: let everybody find it."""
    tables.settle_moves(filling.step)
    for pool, new in zip(tables.pools, filling.new, strict=True):
        for place, block in new:
            pool.publish(block, filling.sequence.block_keys[place])


def _take(pool: BlockPool, keys: AbstractSequence[bytes]) -> list[int | None]:
    blocks = [pool.lookup(key) for key in keys]
    for block in blocks:
        if block is not None:
            pool.incref(block)
    return blocks
