"""Host memory behind the device's blocks: prefixes that were evicted there, and what preempted sequences had computed.

A host slot is as large as one block of its group, over all layers. Slots are counted, shared and evicted like blocks,
under the same keys. What is decided while a step is planned is carried out with that step (`TierMoves`): first all
that leaves the device, then all that comes back. So a block may be given to somebody else as soon as it was decided
that its contents leave, and a slot be read that the same step fills. Slots that a step fills or reads stay held until
it is packed, lest it use one for two things.

An entry is only as good as the step that brings it: if that is rolled back, it is forgotten. So only those whose step was
computed go on to a disk behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from functools import partial

from .blocks import BlockPool
from .disk import Disk
from .plan import TierMoves
from .prefix import is_private


class HostTier:
    """The host slots of all groups, and what moves to and from them with the next step.

    Args:
        max_slots: per group, most slots.
        max_states: most slots for states of sequences.
        prefers_copy: `prefers_copy(tokens, blocks per group, states, ways)` says whether copying so much one way, or out
            and back, is better than computing so many tokens again.
        keeps_prefixes: whether prefixes evicted from the device come here.
        disk: where they go when they are evicted from here; None: nowhere.
        prefers_read: `prefers_read(tokens, blocks per group)` says likewise of reading from the disk.

    Attributes:
        pools: the slots of each group.
        states: the slots for states.
        age: counts the steps that brought something. What comes with the next one is of this age.
    """

    def __init__(
        self,
        max_slots: AbstractSequence[int],
        *,
        max_states: int,
        prefers_copy: Callable[[int, list[int], int, int], bool],
        keeps_prefixes: bool,
        disk: Disk | None = None,
        prefers_read: Callable[[int, list[int]], bool] | None = None,
    ):
        self.pools = [BlockPool(0, count) for count in max_slots]
        self.states = BlockPool(0, max_states, min_growth=1)
        self.prefers_copy = prefers_copy
        self.keeps_prefixes = keeps_prefixes
        self.disk = disk
        self.prefers_read = prefers_read
        self.age = 0
        self._device: list[BlockPool] = []
        self._moves = self._no_moves()
        self._held: list[tuple[BlockPool, int]] = []
        self._entries: dict[tuple[int, int], tuple[int, bytes]] = {}  # by group and slot, age and key of those that may not come
        self._ages: dict[int, int] = {}  # by step under way, the age of what it brings
        if disk is not None:
            for group, pool in enumerate(self.pools):
                pool.on_evict = partial(self._spill, group)

    def watch(self, group: int, pool: BlockPool) -> None:
        """Take in what is evicted from the device's blocks of a group."""
        self._device.append(pool)
        if self.keeps_prefixes:
            pool.on_evict = partial(self._keep, group)

    # -- to the host

    def _keep(self, group: int, block: int, key: bytes) -> None:
        """A block of a prefix is evicted from the device."""
        pool = self.pools[group]
        slot = pool.lookup(key)
        if slot is not None:
            pool.touch(slot)
        elif pool.num_free:
            self._copy_out(group, block, key)

    def _copy_out(self, group: int, block: int, key: bytes | None) -> int:
        """A slot that is to have the block's contents, held until the step is packed."""
        pool = self.pools[group]
        slot = pool.allocate()
        self._moves.out[group].append((block, slot))
        self._held.append((pool, slot))
        if key is not None and pool.publish(slot, key):
            self._entries[group, slot] = self.age, key
        return slot

    def take_in(self, group: int, blocks: AbstractSequence[int], keys: AbstractSequence[bytes | None]) -> list[int] | None:
        """Slots with the contents of `blocks`, one reference each; None (and nothing done) if there is no room.

        Blocks whose key is here already are not copied again.
        """
        pool = self.pools[group]
        slots = [None if key is None else pool.lookup(key) for key in keys]
        found = [slot for slot in slots if slot is not None]
        for slot in found:
            pool.incref(slot)
        if pool.num_free < len(slots) - len(found):
            for slot in found:
                pool.release(slot)
            return None
        for index, (block, key) in enumerate(zip(blocks, keys, strict=True)):
            if slots[index] is None:
                slots[index] = self._copy_out(group, block, key)
                pool.incref(slots[index])
        return slots

    def take_in_state(self, slot: int) -> int | None:
        """A host slot with a copy of the state in `slot`, one reference; None if there is no room."""
        if not self.states.num_free:
            return None
        host_slot = self.states.allocate()
        self._moves.states_out.append((slot, host_slot))
        return host_slot

    # -- from the host

    def copy_back(self, group: int, slot: int, block: int) -> None:
        """`block` is to have the contents of `slot`, whose reference is the tier's from here on."""
        self._moves.back[group].append((slot, block))
        self._held.append((self.pools[group], slot))

    def copy_state_back(self, host_slot: int, slot: int) -> None:
        self._moves.states_back.append((host_slot, slot))
        self._held.append((self.states, host_slot))

    # -- to the disk, and from there

    def _spill(self, group: int, slot: int, key: bytes) -> None:
        """A block of a prefix is evicted from here."""
        if not is_private(key) and (group, slot) not in self._entries:
            self._moves.spilled.append((group, slot, key))

    def storable(self) -> tuple[list[tuple[int, int, bytes]], list[tuple[int, int, bytes]]]:
        """What may go to a disk when no step is under way: group, slot and key of prefix blocks here, and likewise of blocks."""
        here = [(group, *entry) for group, pool in enumerate(self.pools) for entry in pool.published()]
        return (
            [entry for entry in here if not is_private(entry[2]) and entry[:2] not in self._entries],
            [
                (group, *entry)
                for group, pool in enumerate(self._device)
                for entry in pool.published()
                if not is_private(entry[1])
            ],
        )

    def put(self, blocks: Iterable[tuple[int, bytes, object]]) -> int:
        """Slots, as far as there is room, for blocks that were read: group, key, contents. Returns for how many of a group at most."""
        taken = Counter()
        for group, key, contents in blocks:
            pool = self.pools[group]
            if pool.lookup(key) is None and pool.num_free:
                slot = pool.allocate()
                pool.publish(slot, key)
                self._held.append((pool, slot))
                self._entries[group, slot] = self.age, key
                self._moves.read.append((group, slot, contents))
                taken[group] += 1
        return max(taken.values(), default=0)

    # -- steps

    def take_moves(self, step: int) -> TierMoves | None:
        """What moves with this step; None if nothing does."""
        moves, self._moves = self._moves, self._no_moves()
        self._release_held()
        groups = [*moves.out, *moves.back]
        if not (moves.spilled or moves.read or moves.states_out or moves.states_back or any(groups)):
            return None
        self._ages[step] = self.age
        self.age += 1
        moves.num_slots = [pool.num_blocks for pool in self.pools]
        moves.num_states = self.states.num_blocks
        return moves

    def settle(self, step: int) -> None:
        """The step was computed."""
        age = self._ages.pop(step, None)
        if age is not None:
            self._entries = {place: entry for place, entry in self._entries.items() if entry[0] > age}

    def drop_unsettled(self, step: int) -> int:
        """The step failed, or never ran: what it was to bring, and whatever is newer, is not here. Returns its age."""
        return self._drop_since(self._ages.pop(step, self.age))

    def drop_unplanned(self) -> int:
        """Nothing moves that is not part of a step yet. Returns its age."""
        return self._drop_since(self.age)

    def _drop_since(self, first: int) -> int:
        for (group, slot), (age, key) in self._entries.items():
            if age >= first and self.pools[group].key_of(slot) == key:
                self.pools[group].unpublish(slot)
        self._entries = {place: entry for place, entry in self._entries.items() if entry[0] < first}
        self._forget_moves()
        return first

    def _forget_moves(self) -> None:
        self._moves = self._no_moves()
        self._release_held()

    def _release_held(self) -> None:
        for pool, slot in self._held:
            pool.release(slot)
        self._held.clear()

    def _no_moves(self) -> TierMoves:
        return TierMoves([], [], [[] for _ in self.pools], [[] for _ in self.pools], [], [], [], 0)

    # -- as a whole

    def clear_cache(self) -> None:
        """Forget every prefix."""
        for pool in self.pools:
            pool.clear_cache()
        self._entries.clear()

    def reset(self) -> None:
        """Begin anew with no slots; nobody may hold one."""
        self.clear_cache()
        self._forget_moves()
        for pool in [*self.pools, self.states]:
            pool.reset(0)

    def check_integrity(self, refs: AbstractSequence[Mapping[int, int]], states: Mapping[int, int]) -> None:
        """Raise AssertionError unless slots have the references given, of each group and of states, and the tier's own."""
        for pool, expected in zip([*self.pools, self.states], [*refs, states], strict=True):
            pool.check_integrity(Counter(expected) + Counter(slot for owner, slot in self._held if owner is pool))
        for group, out in enumerate(self._moves.out):
            filled = [slot for _, slot in out]
            assert len(set(filled)) == len(filled), f"a slot of group {group} would be filled twice"
