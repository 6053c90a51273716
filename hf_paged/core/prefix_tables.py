"""What sequences find in the prefix cache, publish in it, and have in host memory behind it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING

from .blocks import BlockPool
from .disk import MOST_READINGS, Reading
from .groups import GroupSpec
from .host_tier import HostTier
from .parking import FIRST_HOST, RELEASED, Parking, on_host
from .prefix import Findable, extend_keys, longest_hit
from .request import Sequence

if TYPE_CHECKING:
    from .tables import TableChanges


class PrefixTables:
    """A part of `BlockTables`, which sets all this."""

    block_size: int
    groups: AbstractSequence[GroupSpec]
    pools: list[BlockPool]
    slots: BlockPool
    host: HostTier | None
    parking: Parking
    prefix_cache: bool
    _findable: list[Findable]
    _readable: list[Findable]
    _readings: dict[int, Reading]
    _whole: int

    # -- found

    def longest_hit(self, seq: Sequence, *, on_device: bool = False) -> int:
        """Leading blocks of `seq` that the prefix cache holds, or the part of it `on_device`."""
        self._extend_keys(seq, len(seq.token_ids) // self.block_size)
        pools = self.pools if on_device else self._findable
        return longest_hit(pools, self.groups, seq.block_keys, self._most_hit(seq), self.block_size)

    def best_hit(self, seq: Sequence) -> int:
        """`longest_hit`, or the part of it on the device where copying the rest from host memory is no better than computing it."""
        longest = self.longest_hit(seq)
        if self.host is None or not longest:
            return longest
        on_host = [
            sum(pool.lookup(key) is None for key in seq.block_keys[self._first_seen(group, longest) : longest])
            for pool, group in zip(self.pools, self.groups, strict=True)
        ]
        if not any(on_host):
            return longest
        here = self.longest_hit(seq, on_device=True)
        return longest if self.host.prefers_copy((longest - here) * self.block_size, on_host, 0, 1) else here

    def num_cached(self, seq: Sequence) -> int:
        """About `longest_hit`, found with few lookups: as if a block that is cached had all those before it cached, too."""
        lookup, keys, most = self._findable[self._whole].lookup, seq.block_keys, self._most_hit(seq)
        known, probe = 0, min(1, most)
        while known < most:
            if len(keys) < probe:
                self._extend_keys(seq, probe)
            if lookup(keys[probe - 1]) is None:
                return bisect_left(range(probe), True, lo=known, key=lambda index: lookup(keys[index]) is None)
            known, probe = probe, min(2 * probe, most)
        return known

    def take_hit(self, seq: Sequence, num_blocks: int) -> None:
        """Start the empty `seq` with its first `num_blocks` blocks from the prefix cache.

        Those that are in host memory have to be loaded (`load`) before anything else is done with it but `release`.
        """
        seq.num_computed = num_blocks * self.block_size
        for index, (pool, group, table) in enumerate(zip(self.pools, self.groups, seq.block_tables, strict=True)):
            assert not table, "a hit starts a sequence"
            unseen = self._first_seen(group, num_blocks)
            table.extend([RELEASED] * unseen)
            for key in seq.block_keys[unseen:num_blocks]:
                block = pool.lookup(key)
                if block is not None:
                    pool.incref(block)
                    table.append(block)
                else:
                    slot = self.host.pools[index].lookup(key)
                    self.host.pools[index].incref(slot)
                    table.append(on_host(slot))

    def _first_seen(self, group: GroupSpec, num_blocks: int) -> int:
        """The first of a hit's blocks that the token after it sees in a group."""
        return group.num_unseen_blocks(num_blocks * self.block_size, self.block_size)

    # -- published

    def publish_known(self, seq: Sequence, changes: TableChanges) -> None:
        """The last known token of `seq` became known after a step (that of `changes`) was launched to compute it.

        If it fills a block, that can be published now.
        """
        end = len(seq.token_ids)
        if end % self.block_size == 0 and self.prefix_cache and seq.publishable:
            changes.published += self._publish(seq, end // self.block_size - 1, end // self.block_size)

    def clear_cache(self) -> None:
        for pool in self.pools:
            pool.clear_cache()
        if self.host is not None:
            self.host.clear_cache()
        self.parking.clear()
        self._readings.clear()

    # -- in host memory

    def load(self, seq: Sequence, changes: TableChanges) -> int:
        """Give `seq` blocks of the device for what it has in host memory; `fits` said that there are enough.

        Returns how many of its leading blocks come from there, in any group.
        """
        loaded: set[int] = set()
        for group, table in enumerate(seq.block_tables):
            for index, entry in enumerate(table):
                if entry <= FIRST_HOST:
                    table[index] = self._load(group, on_host(entry), seq, changes)
                    loaded.add(index)
        if seq.state_slot is not None and seq.state_slot <= FIRST_HOST:
            host_slot, seq.state_slot = on_host(seq.state_slot), self.slots.allocate()
            self.host.copy_state_back(host_slot, seq.state_slot)
        return len(loaded)

    def _load(self, group: int, slot: int, seq: Sequence, changes: TableChanges) -> int:
        pool, host_pool = self.pools[group], self.host.pools[group]
        key = host_pool.key_of(slot) if self.prefix_cache and seq.publishable else None
        block = None if key is None else pool.lookup(key)
        if block is not None:  # it is there already: of another sequence, or since this one left
            pool.incref(block)
            host_pool.release(slot)
            return block
        block = pool.allocate()
        self.host.copy_back(group, slot, block)
        if key is not None and pool.publish(block, key):
            changes.published.append((pool, block, key))
        return block

    def swap_out(self, seq: Sequence) -> bool:
        """`release`, but for a copy in host memory with which `seq` goes on later. False (and nothing done) without one."""
        self.release_unseen(seq)
        record = self.parking.save(seq)
        if record is None:
            return False
        self.release(seq)
        self.parking.park(seq, record)
        return True

    def settle_moves(self, step: int) -> None:
        """The step was computed, and with it came what it moved."""
        if self.host is not None:
            self.host.settle(step)

    def take_back_moves(self, step: int) -> None:
        """The step failed: what it was to move to host memory, and whatever was to be moved later, is not there."""
        if self.host is not None:
            self.parking.drop_since(self.host.drop_unsettled(step))

    # -- from the disk

    @property
    def reads(self) -> bool:
        """Whether sequences wait for a disk."""
        return bool(self._readings)

    def is_reading(self, seq: Sequence) -> bool:
        """Whether the waiting `seq` has to wait until more of its prefix was read from the disk. Begins with that."""
        reading = self._readings.get(seq.seq_id)
        if reading is None:
            wanted = self._wanted_of_disk(seq)
            if not wanted:
                return False
            if len(self._readings) >= MOST_READINGS:  # its turn comes when they are read
                return not all(other.done for other in self._readings.values())
            reading = self._readings[seq.seq_id] = self.host.disk.read(wanted)
        return not reading.done

    def take_read(self, seq: Sequence) -> int:
        """Let host memory have what was read for `seq`, if anything was. Returns how many blocks of a group that is at most."""
        reading = self._readings.pop(seq.seq_id, None)
        return 0 if reading is None else self.host.put(reading.blocks())

    def _wanted_of_disk(self, seq: Sequence) -> list[tuple[int, bytes]]:
        """(group, key) of the blocks on disk with which more of `seq` would be found; as many as host memory has room for."""
        if self.host is None or self.host.disk is None:
            return []
        found = self.longest_hit(seq)
        most = min(self._most_hit(seq), found + min(pool.num_free for pool in self.host.pools))
        count = longest_hit(self._readable, self.groups, seq.block_keys, most, self.block_size)
        if count == found:
            return []
        seen = [seq.block_keys[self._first_seen(group, count) : count] for group in self.groups]
        wanted = [
            [key for key in keys if here.lookup(key) is None] for keys, here in zip(seen, self._findable, strict=True)
        ]
        if not self.host.prefers_read((count - found) * self.block_size, list(map(len, wanted))):
            return []
        for pool, keys in zip(self.host.pools, seen, strict=True):  # not to give its place to what goes on from it
            for slot in map(pool.lookup, reversed(keys)):
                if slot is not None:
                    pool.touch(slot)
        return [(index, key) for index, keys in enumerate(wanted) for key in keys]

    # -- private

    def _most_hit(self, seq: Sequence) -> int:
        """Blocks it may take from the prefix cache. At least one token is left to compute."""
        most = len(seq.token_ids) - 1
        if seq.request.max_cached_tokens is not None:
            most = min(most, seq.request.max_cached_tokens)
        return most // self.block_size

    def _extend_keys(self, seq: Sequence, num_blocks: int) -> None:
        request = seq.request
        seeds = request.cache_salt, request.adapter, request.media
        extend_keys(seq.block_keys, seq.token_ids, num_blocks, self.block_size, *seeds)

    def _publish(self, seq: Sequence, begin: int, end: int) -> list[tuple[BlockPool, int, bytes]]:
        """Publish blocks `begin` to `end` of `seq`, which the step being planned fills. Returns what was not yet there.

        They are findable at once: a layer writes all keys and values of a step before any attention reads them.
        """
        self._extend_keys(seq, end)
        published = []
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            for index in range(begin, end):
                key = seq.block_keys[index]
                if pool.publish(table[index], key):
                    published.append((pool, table[index], key))
        return published
