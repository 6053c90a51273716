"""Waiting sequences that have keys and values in host memory.

A sequence that waits holds no blocks, as a rule: what it had is computed again. A parked one was preempted while host
memory had room for what it had. Its record stands for its block tables until it is admitted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .blocks import BlockPool
from .host_tier import HostTier
from .request import Sequence

RELEASED = -1  # table entry of a block that a sliding group gave back
FIRST_HOST = -2  # table entry of host slot 0; those of the others lie below


def on_host(slot: int) -> int:
    """The table entry of a host slot; and the slot of such an entry."""
    return FIRST_HOST - slot


@dataclass(slots=True)
class Parked:
    """What a waiting sequence has.

    Attributes:
        num_tokens: leading tokens whose keys and values it has.
        tables: per group, for every `block_size` of them, `on_host` of a host slot, or RELEASED where nobody sees it.
        state: `on_host` of a host slot; None if it keeps no state.
        age: it came with a step of this age (`HostTier.age`).
    """

    num_tokens: int
    tables: list[list[int]]
    state: int | None
    age: int


class Parking:
    """The records of parked sequences, by seq_id, each with its references to host slots.

    Args:
        pools: the device's blocks by group.
        host: host memory; None: there is none.
    """

    def __init__(self, pools: list[BlockPool], host: HostTier | None):
        self._pools, self._host = pools, host
        self._parked: dict[int, Parked] = {}

    def save(self, seq: Sequence) -> Parked | None:
        """A record of what the running `seq` has, in host memory; None if that is no better than computing it again."""
        host = self._host
        if host is None or not seq.num_computed or seq.publishable != seq.request.write_prefix_cache:
            return None  # (the last: it was computed under older weights, and could start over under the new ones)
        keys = [
            [(block, pool.key_of(block)) for block in table if block != RELEASED]
            for pool, table in zip(self._pools, seq.block_tables, strict=True)
        ]
        new = [sum(pool.lookup(key) is None for _, key in kept) for pool, kept in zip(host.pools, keys, strict=True)]
        if not host.prefers_copy(seq.num_computed, new, int(seq.state_slot is not None), 2):
            return None
        record = Parked(seq.num_computed, [], None, host.age)
        for group, (kept, table) in enumerate(zip(keys, seq.block_tables, strict=True)):
            slots = host.take_in(group, [block for block, _ in kept], [key for _, key in kept])
            if slots is None:
                self._release(record)
                return None
            taken = iter(slots)
            record.tables.append([RELEASED if block == RELEASED else on_host(next(taken)) for block in table])
        if seq.state_slot is not None:
            slot = host.take_in_state(seq.state_slot)
            if slot is None:
                self._release(record)
                return None
            record.state = on_host(slot)
        return record

    def park(self, seq: Sequence, record: Parked) -> None:
        """The waiting `seq` has what `record` says, whose references are the parking's from here on."""
        assert seq.seq_id not in self._parked and not any(seq.block_tables)
        self._parked[seq.seq_id] = record

    def take(self, seq: Sequence) -> Parked | None:
        """Give the waiting `seq` its tables back, with the entries of host slots; None if it is not parked."""
        record = self._parked.pop(seq.seq_id, None)
        if record is not None:
            seq.num_computed, seq.block_tables, seq.state_slot = record.num_tokens, record.tables, record.state
        return record

    def put_back(self, seq: Sequence, record: Parked) -> None:
        """`take`, undone."""
        seq.num_computed, seq.block_tables, seq.state_slot = 0, [[] for _ in self._pools], None
        self.park(seq, record)

    def drop(self, seq_id: int) -> None:
        """Forget what a sequence has; nothing happens if it is not parked."""
        record = self._parked.pop(seq_id, None)
        if record is not None:
            self._release(record)

    def drop_since(self, age: int) -> None:
        """Forget what came with a step of this age, or was to come later."""
        for seq_id in [seq_id for seq_id, record in self._parked.items() if record.age >= age]:
            self.drop(seq_id)

    def clear(self) -> None:
        for seq_id in list(self._parked):
            self.drop(seq_id)

    def count(self) -> tuple[list[Counter], Counter]:
        """The references that records have to host slots: of each group, and of states."""
        groups, states = [Counter() for _ in self._pools], Counter()
        for record in self._parked.values():
            for group, table in enumerate(record.tables):
                groups[group].update(on_host(entry) for entry in table if entry != RELEASED)
            if record.state is not None:
                states[on_host(record.state)] += 1
        return groups, states

    def _release(self, record: Parked) -> None:
        for group, table in enumerate(record.tables):
            for entry in reversed(table):
                self.release_entry(group, entry)
        if record.state is not None:
            self._host.states.release(on_host(record.state))

    def release_entry(self, group: int, entry: int) -> None:
        """Give back what an entry of a table stands for."""
        if entry >= 0:
            self._pools[group].release(entry)
        elif entry != RELEASED:
            self._host.pools[group].release(on_host(entry))
