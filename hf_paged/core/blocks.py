"""One pool of KV blocks, or of state slots: reference counts, the free lists and the prefix-cache index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

MIN_GROWTH_BLOCKS = 16


class BlockPool:
    """Blocks 0 to num_blocks - 1, of which new ones appear on demand up to `max_blocks`.

    A block is in use while its reference count is above 0. A block with a key whose count fell to 0 stays findable
    until it is evicted, least recently used first. Blocks without a key are handed out before the pool grows, and it
    grows before anything is evicted.

    Args:
        num_blocks: blocks to begin with.
        max_blocks: blocks it may grow to.
        min_growth: fewest blocks it grows by.

    Attributes:
        on_evict: called as `on_evict(block, key)` when a block with a key is handed out for something else.
        refs: reference count of every block.
        num_in_use: blocks with a count above 0.
        peak_in_use: highest `num_in_use` since the start or `reset_peak`.
    """

    __slots__ = (
        "_block_of",
        "_blank",
        "_cached",
        "_key_of",
        "_min_growth",
        "max_blocks",
        "num_in_use",
        "on_evict",
        "peak_in_use",
        "refs",
    )

    def __init__(self, num_blocks: int, max_blocks: int, min_growth: int = MIN_GROWTH_BLOCKS):
        assert 0 <= num_blocks <= max_blocks, (num_blocks, max_blocks)
        self.max_blocks = max_blocks
        self._min_growth = min_growth
        self.on_evict: Callable[[int, bytes], None] | None = None
        self.refs = [0] * num_blocks
        self.num_in_use = 0
        self.peak_in_use = 0
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, no key; a stack that hands out low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with key; least recently used first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that exist now."""
        return len(self.refs)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, by growth and eviction too."""
        return self.max_blocks - self.num_in_use

    @property
    def num_blank(self) -> int:
        """Blocks that `allocate` can hand out, by growth too, without evicting any."""
        return len(self._blank) + self.max_blocks - len(self.refs)

    @property
    def num_cached(self) -> int:
        """Blocks with a key that nobody holds."""
        return len(self._cached)

    @property
    def num_published(self) -> int:
        """Blocks with a key, in use or free."""
        return len(self._key_of)

    def allocate(self) -> int:
        """A block with a reference count of 1 and no key. The caller checks `num_free` first."""
        assert self.num_in_use < self.max_blocks, "allocate() from an exhausted pool"
        if not self._blank and len(self.refs) < self.max_blocks:
            self._grow()
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._key_of.pop(block)
            del self._block_of[key]
            if self.on_evict is not None:
                self.on_evict(block, key)
        self.refs[block] = 1
        self._count_used()
        return block

    def incref(self, block: int) -> None:
        """One more holder; revives a cached block."""
        if self.refs[block] == 0:
            del self._cached[block]
            self._count_used()
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One holder less; at 0 the block is free, and still findable if it has a key."""
        assert self.refs[block] > 0, f"block {block} released too often"
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.num_in_use -= 1
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def lookup(self, key: bytes) -> int | None:
        """The block published under `key`; take it with `incref`."""
        return self._block_of.get(key)

    def key_of(self, block: int) -> bytes | None:
        return self._key_of.get(block)

    def published(self) -> Iterable[tuple[int, bytes]]:
        """Every block with a key, and its key."""
        return self._key_of.items()

    def publish(self, block: int, key: bytes) -> bool:
        """Make `block` findable. False (and nothing done) if another block has the key already."""
        assert self.refs[block] > 0, f"block {block} published while free"
        if key in self._block_of:
            return False
        assert block not in self._key_of, f"block {block} has a key already"
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def unpublish(self, block: int) -> None:
        """Make `block` unfindable, if it has a key: its content is not what the key promises."""
        key = self._key_of.pop(block, None)
        if key is None:
            return
        del self._block_of[key]
        if self.refs[block] == 0:
            del self._cached[block]
            self._blank.append(block)

    def touch(self, block: int) -> None:
        """The block, which has a key, is now the last to be evicted."""
        if self.refs[block] == 0:
            self._cached.move_to_end(block)

    def clear_cache(self) -> None:
        """Drop every key. Blocks in use stay in use."""
        self._blank.extend(reversed(self._cached))
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()

    def resize(self, max_blocks: int) -> dict[int, int]:
        """Let there be at most `max_blocks` blocks; no more may be in use.

        Returns where the contents of blocks in use that are no more have to go: {old: new}. Cached blocks beyond are
        forgotten, and more of them if their place is needed, least recently used first.
        """
        assert self.num_in_use <= max_blocks and max_blocks >= 1, (self.num_in_use, max_blocks)
        self.max_blocks = max_blocks
        for block in [block for block in self._cached if block >= max_blocks]:
            self.unpublish(block)
        self._blank = [block for block in self._blank if block < max_blocks]
        moves = {}
        for old in range(max_blocks, self.num_blocks):
            if self.refs[old]:
                moves[old] = self._move(old)
        del self.refs[max_blocks:]
        return moves

    def _move(self, old: int) -> int:
        """Hand everything that `old` is to a free block; nothing is left of `old`."""
        if not self._blank:
            self.unpublish(next(iter(self._cached)))
        new = self._blank.pop()
        self.refs[new], self.refs[old] = self.refs[old], 0
        key = self._key_of.pop(old, None)
        if key is not None:
            self._key_of[new], self._block_of[key] = key, new
        return new

    def reset(self, num_blocks: int) -> None:
        """Begin anew with `num_blocks` free blocks and no keys; none may be in use."""
        assert not self.num_in_use and num_blocks <= self.max_blocks
        self.clear_cache()
        self.refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))

    def reset_peak(self) -> None:
        self.peak_in_use = self.num_in_use

    def check_integrity(self, expected_refs: Mapping[int, int]) -> None:
        """Raise AssertionError unless counts are as expected and every block is in exactly one place."""
        for block, count in enumerate(self.refs):
            expected = expected_refs.get(block, 0)
            assert count == expected, f"block {block} has {count} references, {expected} expected"
        assert all(0 <= block < self.num_blocks for block in expected_refs), "reference to a block that does not exist"
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is twice in the free list"
        assert not blank & cached, "a block is both blank and cached"
        free = {block for block, count in enumerate(self.refs) if count == 0}
        assert blank | cached == free, f"free lists differ from the free blocks: {(blank | cached) ^ free}"
        assert self.num_in_use == self.num_blocks - len(free), "num_in_use is off"
        assert self.num_in_use <= self.peak_in_use and self.num_blocks <= self.max_blocks
        assert self._block_of == {key: block for block, key in self._key_of.items()}, "the two key indices differ"
        assert len(self._block_of) == len(self._key_of), "two blocks have one key"
        assert cached == {block for block in self._key_of if self.refs[block] == 0}, "cached blocks and keys differ"

    def _grow(self) -> None:
        """Add half as many blocks again: few reallocations of the tensors, little waste."""
        old = self.num_blocks
        new = min(self.max_blocks, old + max(old // 2, self._min_growth))
        self.refs.extend([0] * (new - old))
        self._blank.extend(range(new - 1, old - 1, -1))

    def _count_used(self) -> None:
        self.num_in_use += 1
        if self.num_in_use > self.peak_in_use:
            self.peak_in_use = self.num_in_use
