"""Prefix-cache keys (a hash chain over token blocks) and the search for the longest usable prefix.

    key[-1] = sha256(tag | adapter, if any | kind of salt | salt)
    key[i] = sha256(key[i - 1] | tokens of block i, 8 bytes each | the media spans that begin in it, if any)

Keys of chains with a salt or an adapter have a byte more, the same in each: what it says is theirs alone (`is_private`).

A key names the whole history up to the end of its block, so equal keys mean equal keys and values. SHA-256 because a
forged collision would let one caller read the effects of another's prompt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as AbstractSequence
from typing import Protocol

from .groups import GroupSpec
from .request import MediaSpan

_ROOT_TAG = b"hf_paged prefix root\0"
_DIGEST_BYTES = 32
_PRIVATE = b"\1"


def root_key(cache_salt: str | bytes | None, adapter: int = 0) -> bytes:
    """Start of the chain. None, "" and b"" are three different salts; every `Request.adapter` has chains of its own."""
    if cache_salt is None:
        salt = b"\0"
    elif isinstance(cache_salt, str):
        salt = b"\1" + cache_salt.encode("utf-8", "surrogatepass")
    else:
        salt = b"\2" + bytes(cache_salt)
    own = b"\3" + adapter.to_bytes(8, "big") if adapter else b""
    private = _PRIVATE if adapter or cache_salt is not None else b""
    return hashlib.sha256(_ROOT_TAG + own + salt).digest() + private


def is_private(key: bytes) -> bool:
    """Whether it is of a chain with a salt, or with an adapter, whose number means nothing to another process."""
    return len(key) > _DIGEST_BYTES


def extend_keys(
    keys: list[bytes],
    token_ids: list[int],
    num_blocks: int,
    block_size: int,
    cache_salt: str | bytes | None,
    adapter: int = 0,
    media: AbstractSequence[MediaSpan] = (),
) -> None:
    """Append to `keys` until it holds those of the first `num_blocks` blocks of `token_ids`."""
    if len(keys) >= num_blocks:
        return
    key = keys[-1] if keys else root_key(cache_salt, adapter)
    for start in range(len(keys) * block_size, num_blocks * block_size, block_size):
        block = array("q", token_ids[start : start + block_size]).tobytes()
        if media:
            block += _begun(media, start, start + block_size)
        key = hashlib.sha256(key + block).digest() + key[_DIGEST_BYTES:]
        keys.append(key)


class Findable(Protocol):
    """Blocks of one group, by key."""

    def lookup(self, key: bytes) -> int | None:
        """A block; None if there is none."""
        ...


class EitherPool:
    """Blocks that are in one pool or another. A `Findable`."""

    def __init__(self, *pools: Findable):
        self._pools = pools

    def lookup(self, key: bytes) -> int | None:
        return next((block for pool in self._pools if (block := pool.lookup(key)) is not None), None)


def _begun(media: AbstractSequence[MediaSpan], start: int, end: int) -> bytes:
    """The spans that begin in a block: place, length, whether bidirectional, offset, key."""
    parts = []
    for span in media:
        if start <= span.start < end:
            numbers = array("q", [span.start - start, span.length, span.bidirectional, span.offset, len(span.key)])
            parts.append(numbers.tobytes() + span.key)
    return b"".join(parts)


def longest_hit(
    pools: AbstractSequence[Findable],
    groups: AbstractSequence[GroupSpec],
    keys: AbstractSequence[bytes],
    max_hit_blocks: int,
    block_size: int,
) -> int:
    """Most leading blocks, up to `max_hit_blocks`, after which a sequence can go on in every group.

    A full-attention group needs all of them; a sliding group those that its next query still sees.
    """
    best = 0
    runs = [0] * len(pools)  # published blocks in a row, up to the current one
    for count in range(1, max_hit_blocks + 1):
        key = keys[count - 1]
        usable = True
        for index, group in enumerate(groups):
            if pools[index].lookup(key) is not None:
                runs[index] += 1
            elif group.span is None:
                return best
            else:
                runs[index] = 0
            if group.span is not None:
                needed = count - group.num_unseen_blocks(count * block_size, block_size)
                usable = usable and runs[index] >= needed
        if usable:
            best = count
    return best
