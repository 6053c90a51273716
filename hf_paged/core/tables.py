"""Block tables of sequences over all block groups: what a step takes, shares, copies, publishes and gives back.

Models with state-space, linear-attention or convolution layers also keep a state per sequence, of one size whatever the
sequence's length. It lives in a slot, which is taken, shared by forks and given back together with the blocks. Nobody
copies slots: a sequence whose slot is shared reads it and writes another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as AbstractSequence

from .blocks import BlockPool
from .disk import OnDisk, Reading
from .groups import GroupSpec
from .host_tier import HostTier
from .media import longest_block
from .parking import RELEASED, Parking
from .plan import TierMoves
from .prefix import EitherPool, Findable
from .prefix_tables import PrefixTables
from .request import Request, Sequence


class TableChanges:
    """What the sequences of one step did to the pools.

    Attributes:
        copies: [group] -> (source, destination) blocks to copy before the step.
        sources: (pool, block) of the copies' sources: held until the whole step is planned, so that no source
            becomes the destination of another copy and copies may run in any order.
        leaving: (group, block) -> its copies: the last sharer of a block writes into the block itself.
        published: (pool, block, key) of the blocks this step fills.
        states: by seq_id, (slot its state is read from, slot it is written to); -1 to read: an empty state.
    """

    __slots__ = ("_moves", "copies", "leaving", "published", "sources", "states")

    def __init__(self, num_groups: int):
        self.copies: list[list[tuple[int, int]]] = [[] for _ in range(num_groups)]
        self.sources: list[tuple[BlockPool, int]] = []
        self.leaving: Counter[tuple[int, int]] = Counter()
        self.published: list[tuple[BlockPool, int, bytes]] = []
        self.states: dict[int, tuple[int, int]] = {}
        self._moves: TierMoves | None = None

    def take_moves(self, host: HostTier | None, step: int) -> TierMoves | None:
        """What moves to and from host memory with the step; a step that is packed again has it again."""
        if self._moves is None and host is not None:
            self._moves = host.take_moves(step)
        return self._moves

    def release_sources(self) -> None:
        for pool, block in self.sources:
            pool.release(block)
        self.sources.clear()

    def unpublish(self) -> None:
        """The step failed: nobody may find the blocks it was to fill."""
        for pool, block, key in self.published:
            if pool.key_of(block) == key:
                pool.unpublish(block)
        self.published.clear()


class BlockTables(PrefixTables):
    """The pools of all groups, and the operations on a sequence's block tables; those of prefixes are `PrefixTables`.

    Attributes:
        pools: one per group.
        slots: the pool of state slots; it has none if the model keeps no state.
        host: host memory behind them; None: there is none.
        parking: what waiting sequences have nonetheless.
        num_releases: counts releases; while it stands still, no block has become free.
    """

    def __init__(
        self,
        groups: AbstractSequence[GroupSpec],
        block_size: int,
        num_blocks: AbstractSequence[int],
        max_blocks: AbstractSequence[int],
        prefix_cache: bool,
        max_slots: int = 0,
        host: HostTier | None = None,
    ):
        assert groups or max_slots, "a model keeps keys and values, or a state"
        assert len(groups) == len(num_blocks) == len(max_blocks), "one pool per group"
        assert not (prefix_cache and max_slots), "blocks are no prefix to go on from without the state at their end"
        self.block_size = block_size
        self.groups = list(groups)
        self.pools = [BlockPool(now, most) for now, most in zip(num_blocks, max_blocks, strict=True)]
        self.slots = BlockPool(0, max_slots, min_growth=1)  # a slot may be large, so no more of them than needed
        self.prefix_cache = prefix_cache
        self.host = host
        self.parking = Parking(self.pools, host)
        self.num_releases = 0
        self._findable: list[Findable] = self.pools
        if host is not None:
            self._findable = [EitherPool(*pair) for pair in zip(self.pools, host.pools, strict=True)]
            for group, pool in enumerate(self.pools):
                host.watch(group, pool)
        self._readings: dict[int, Reading] = {}
        self._readable = self._findable
        if host is not None and host.disk is not None:
            self._readable = [EitherPool(here, OnDisk(host.disk, index)) for index, here in enumerate(self._findable)]
        self._sliding = [index for index, group in enumerate(groups) if group.span is not None]
        self._whole = next((index for index, group in enumerate(groups) if group.span is None), 0)

    @property
    def has_state(self) -> bool:
        """Whether sequences keep a recurrent state. It can be forked, but not taken back by some tokens."""
        return self.slots.max_blocks > 0

    @property
    def max_blocks(self) -> list[int]:
        """Blocks that each group may have."""
        return [pool.max_blocks for pool in self.pools]

    # -- taking blocks

    def room(self, seq: Sequence, want: int) -> int:
        """How many of the next `want` tokens of `seq` fit into the blocks it has and those that are free."""
        num_computed, block_size = seq.num_computed, self.block_size
        if self._lacks_slot(seq) and not self.slots.num_free:
            return 0
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            spare = len(table) * block_size - num_computed
            free = pool.num_free
            if spare and pool.refs[table[-1]] > 1:  # to be written and shared: it is copied first
                if not free:
                    return 0
                free -= 1
            if spare < want:
                want = min(want, spare + free * block_size)
        return want

    def extend(self, seq: Sequence, count: int, changes: TableChanges) -> None:
        """Give `seq` the blocks for its next `count` tokens (`room` said they fit) and publish those that fill up.

        A block whose last token is still unknown has to wait for `publish_known`.
        """
        block_size, begin = self.block_size, seq.num_computed
        end = begin + count
        for group, (pool, table) in enumerate(zip(self.pools, seq.block_tables, strict=True)):
            if begin % block_size and pool.refs[table[-1]] > 1 + changes.leaving[group, table[-1]]:
                source, table[-1] = table[-1], pool.allocate()
                changes.copies[group].append((source, table[-1]))
                changes.sources.append((pool, source))
                changes.leaving[group, source] += 1
            while len(table) * block_size < end:
                table.append(pool.allocate())
        if self.has_state:
            self._take_slot(seq, changes)
        fills = begin // block_size < end // block_size and end <= len(seq.token_ids)  # an unknown token gives no key
        if fills and self.prefix_cache and seq.publishable:
            changes.published += self._publish(seq, begin // block_size, end // block_size)

    def extend_for_drafts(self, seq: Sequence, begin: int, want: int) -> int:
        """Give `seq` blocks for up to `want` draft tokens from position `begin` on; returns how many tokens that is.

        Only blocks that nobody has a use for are taken. Nothing is published: drafts may turn out wrong.
        """
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            want = min(want, (len(table) + pool.num_blank) * self.block_size - begin)
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            while len(table) * self.block_size < begin + want:
                table.append(pool.allocate())
        return want

    def settle_drafts(self, seq: Sequence, num_known: int, num_tokens: int) -> None:
        """The step computed drafts beyond the `num_known` tokens of `seq`, and its first `num_tokens` are right.

        They fill blocks that can be published now; the blocks beyond them are given back.
        """
        self.truncate(seq, num_tokens)
        begin, end = num_known // self.block_size, num_tokens // self.block_size
        if self.prefix_cache and seq.publishable and begin < end:
            self._publish(seq, begin, end)

    def fork(self, seq: Sequence, sibling: Sequence) -> None:
        """Let the new `sibling` share all blocks and the state of `seq`."""
        sibling.block_keys = list(seq.block_keys)
        sibling.publishable = seq.publishable
        sibling.num_computed = seq.num_computed
        sibling.block_tables = [list(table) for table in seq.block_tables]
        for pool, table in zip(self.pools, sibling.block_tables, strict=True):
            for block in table:
                if block != RELEASED:
                    pool.incref(block)
        if seq.state_slot is not None:
            sibling.state_slot = seq.state_slot
            self.slots.incref(seq.state_slot)

    # -- giving blocks back

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """Give back the blocks of `seq` beyond its first `num_tokens` tokens.

        A block that is now full only in part will be written again, so it leaves the prefix cache unless others hold it:
        then `extend` copies it first. A state cannot be taken back, except to nothing.
        """
        assert not self.has_state or num_tokens in (0, seq.num_computed), "a state cannot be taken back"
        if num_tokens == 0:
            self._release_slot(seq)
        keep = _ceil_div(num_tokens, self.block_size)
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            for block in reversed(table[keep:]):
                if block != RELEASED:
                    pool.release(block)
            del table[keep:]
            if num_tokens % self.block_size and pool.refs[table[-1]] == 1:
                pool.unpublish(table[-1])
        del seq.block_keys[num_tokens // self.block_size :]
        seq.num_computed = num_tokens
        self.num_releases += 1

    def release_unseen(self, seq: Sequence) -> None:
        """Give back the blocks of sliding groups that no further query of `seq` can see."""
        for group in self._sliding:
            table = seq.block_tables[group]
            index = self.groups[group].num_unseen_blocks(seq.num_computed, self.block_size) - 1
            while index >= 0 and table[index] != RELEASED:
                self.pools[group].release(table[index])
                table[index] = RELEASED
                index -= 1
                self.num_releases += 1

    def release(self, seq: Sequence) -> None:
        """Give back all blocks of `seq`, tails first: they are the least likely to be hit, so evicted first; and its state.

        The tables are replaced, not emptied: a plan under way still refers to the old lists.
        """
        self.parking.drop(seq.seq_id)
        self._readings.pop(seq.seq_id, None)
        for group, table in enumerate(seq.block_tables):
            for entry in reversed(table):
                self.parking.release_entry(group, entry)
        seq.block_tables = [[] for _ in self.pools]
        self._release_slot(seq)
        seq.num_computed = 0
        self.num_releases += 1

    # -- sizes

    def resize(self, max_blocks: list[int], sequences: AbstractSequence[Sequence]) -> list[dict[int, int]]:
        """Change the number of blocks a group may have; the tables of `sequences`, all there are, follow.

        No more may be in use. Returns per group which blocks' contents have to go where, {old: new}.
        """
        if self.host is not None:  # what was to be copied is not where it was
            self.parking.drop_since(self.host.drop_unplanned())
        moves = [pool.resize(most) for pool, most in zip(self.pools, max_blocks, strict=True)]
        for seq in sequences:
            for moved, table in zip(moves, seq.block_tables, strict=True):
                if moved:
                    table[:] = [moved.get(block, block) for block in table]
        self.num_releases += 1  # whoever found no room may find some now
        return moves

    def reset(self, num_blocks: list[int]) -> None:
        """Begin anew, each group with so many blocks; no sequence may hold any, nor a state. Host memory, too."""
        self.parking.clear()
        self._readings.clear()
        if self.host is not None:
            self.host.reset()
        for pool, count in zip(self.pools, num_blocks, strict=True):
            pool.reset(count)
        self.slots.reset(0)
        self.num_releases += 1

    def fits(self, seq: Sequence, chunk: int, headroom: int) -> bool:
        """Whether all known tokens of `seq`, taken in steps of `chunk`, fit and leave `headroom` blocks a group.

        Its state, and those of the siblings it will fork, must find slots too.
        """
        if self.has_state and self.slots.num_free < seq.seats:
            return False
        num_blocks = _ceil_div(len(seq.token_ids), self.block_size)
        for pool, group, table in zip(self.pools, self.groups, seq.block_tables, strict=True):
            held = sum(entry >= 0 for entry in table)
            need = num_blocks - table.count(RELEASED)
            if group.span is not None:
                need = min(need, _most_touched(group.span + chunk, self.block_size))
            if max(need - held, 1) + headroom > pool.num_free:
                return False
        return True

    def most_blocks(self, request: Request, max_model_len: int) -> list[int]:
        """Blocks a group that `request` holds at most, with all its sequences at full length and nothing else."""
        block_size, num_prompt = self.block_size, len(request.prompt_token_ids)
        # the last output token is never fed back, so its keys and values are never stored
        num_stored = max(num_prompt, min(num_prompt + request.max_tokens, max_model_len) - 1)
        own, shared = _ceil_div(num_stored, block_size), num_prompt // block_size
        whole = shared + request.n * (own - shared)
        together = max(1, longest_block(request.media))  # tokens that are computed in one step
        touched = [
            None if group.span is None else _most_touched(group.span + together - 1, block_size)
            for group in self.groups
        ]
        return [whole if most is None else min(whole, request.n * min(own, most)) for most in touched]

    def check_integrity(self, sequences: AbstractSequence[Sequence], num_tokens: dict[int, int]) -> None:
        """Raise AssertionError unless pools and tables agree. `num_tokens`: tokens each table must cover, by seq_id."""
        expected = [Counter() for _ in self.pools]
        for seq in sequences:
            for group, (pool, table) in enumerate(zip(self.pools, seq.block_tables, strict=True)):
                assert len(table) == _ceil_div(num_tokens[seq.seq_id], self.block_size), f"table length of {seq}"
                unseen = self.groups[group].num_unseen_blocks(seq.num_computed, self.block_size)
                for index, block in enumerate(table):
                    if block == RELEASED:
                        assert index < unseen, f"{seq} lost block {index} of group {group}, which it still sees"
                        continue
                    expected[group][block] += 1
                    key = pool.key_of(block)
                    assert key is None or key == seq.block_keys[index], f"{seq} holds a block of another prefix"
        slots = {seq.seq_id: seq.state_slot for seq in sequences if seq.state_slot is not None}
        slot_refs = Counter(slots.values())
        for pool, refs in zip(self.pools, expected, strict=True):
            pool.check_integrity(refs)
        begun = {seq.seq_id for seq in sequences if num_tokens[seq.seq_id]} if self.has_state else set()
        assert slots.keys() == begun, f"states of {begun ^ slots.keys()} are missing, or were kept"
        self.slots.check_integrity(slot_refs)
        if self.host is not None:
            self.host.check_integrity(*self.parking.count())

    # -- private

    def _lacks_slot(self, seq: Sequence) -> bool:
        """Whether `seq` needs a free slot to write its state to."""
        return self.has_state and (seq.state_slot is None or self.slots.refs[seq.state_slot] > 1)

    def _take_slot(self, seq: Sequence, changes: TableChanges) -> None:
        """A slot of its own for `seq` to write to. All states are read first, so others may write where it reads."""
        read = -1 if seq.state_slot is None else seq.state_slot
        if self._lacks_slot(seq):
            self._release_slot(seq)
            seq.state_slot = self.slots.allocate()
        changes.states[seq.seq_id] = read, seq.state_slot

    def _release_slot(self, seq: Sequence) -> None:
        if seq.state_slot is not None:
            self.slots.release(seq.state_slot)
            seq.state_slot = None

def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _most_touched(num_tokens: int, block_size: int) -> int:
    """Most blocks that `num_tokens` consecutive tokens touch, wherever they start."""
    return (num_tokens + block_size - 2) // block_size + 1
