"""Sequences driven from outside the scheduler: their owner says which tokens come next, and when they end.

Beam search, assisted decoding and draft models decide by rules of their own what every row computes, forks and takes
back. They hold sequences here: the same pools and block tables as the scheduler's, but no queue and no seat. A held
sequence is never preempted; one that lacks blocks takes them from the scheduler's running sequences, last in order.
Only expendable ones, whose owner can do without what they hold, are emptied when anybody else lacks blocks; and pinned
ones (`core.pinned`) when nothing else is left to take.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as AbstractSequence

from ..base.errors import CacheFull
from .pinned import Filling, find, pin, publish
from .plan import StepPlan
from .request import MediaSpan, Request, Sequence, SequenceStatus
from .step import StepBuilder
from .tables import RELEASED, BlockTables

_ORDER = (0, 0)  # held sequences stand in no queue, so nothing sorts them


class HeldSequences:
    """The held sequences of one scheduler.

    Args:
        tables: the scheduler's block tables.
        new_id: gives the next sequence id, of the scheduler's own numbering.
        new_step: counts one more plan and gives its number.
        make_room: takes the blocks of a running sequence; False if there is none left to take from.
    """

    def __init__(
        self,
        tables: BlockTables,
        *,
        new_id: Callable[[], int],
        new_step: Callable[[], int],
        make_room: Callable[[], bool],
    ):
        self._tables = tables
        self._new_id = new_id
        self._new_step = new_step
        self._make_room = make_room
        self._sequences: dict[int, Sequence] = {}
        self._expendable: set[int] = set()
        self._pinned: dict[int, Sequence] = {}

    def __iter__(self):
        return iter(self._sequences.values())

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def holds_blocks(self) -> bool:
        return any(map(_holds_blocks, self._sequences.values()))

    # -- life of a sequence

    def new(
        self,
        name: str,
        *,
        cache_salt: str | bytes | None = None,
        adapter: int = 0,
        media: tuple[MediaSpan, ...] = (),
        publish: bool = True,
        expendable: bool = False,
    ) -> Sequence:
        """An empty sequence.

        Args:
            media: see `Request`; the tokens to come must be those they are spans of.
            publish: its blocks may enter the prefix cache.
            expendable: it may be emptied whenever somebody lacks blocks; its owner looks before each use.
        """
        seeds = dict(cache_salt=cache_salt, adapter=adapter, media=media)
        request = Request(request_id=name, prompt_token_ids=[], max_tokens=1, **seeds)
        sequence = self._enter(request, 0)
        sequence.publishable = publish
        if expendable:
            self._expendable.add(sequence.seq_id)
        return sequence

    def fork(self, source: Sequence) -> Sequence:
        """A sequence with the tokens of `source`, sharing all its blocks and its state."""
        sequence = self._enter(source.request, source.index)
        sequence.token_ids, sequence.num_prompt = list(source.token_ids), source.num_prompt
        self._tables.fork(source, sequence)
        if source.seq_id in self._expendable:
            self._expendable.add(sequence.seq_id)
        return sequence

    def release_unseen(self, sequence: Sequence) -> None:
        """Give back what sliding groups keep and no later token sees. It cannot be truncated then."""
        self._tables.release_unseen(sequence)

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens. No sliding group may have given back what they still see.

        Not for models that keep a state (`Scheduler.has_state`), which cannot be taken back.
        """
        assert 0 <= num_tokens <= sequence.num_computed
        del sequence.token_ids[num_tokens:]
        self._tables.truncate(sequence, num_tokens)

    def release(self, sequence: Sequence) -> None:
        """End a sequence and give its blocks back. Ending it twice is fine."""
        if self._sequences.pop(sequence.seq_id, None) is None:
            return
        self._expendable.discard(sequence.seq_id)
        self._pinned.pop(sequence.seq_id, None)
        sequence.status = SequenceStatus.FINISHED
        self._tables.release(sequence)

    def empty_one(self, keep: Container[int] = ()) -> bool:
        """Empty an expendable sequence, none of `keep` (ids). False if there is none that holds blocks."""
        for sequence in self._sequences.values():
            if sequence.seq_id in self._expendable and sequence.seq_id not in keep and _holds_blocks(sequence):
                self.truncate(sequence, 0)
                return True
        return False

    def empty_pinned(self) -> bool:
        """Empty a pinned sequence. False if there is none that holds blocks."""
        for sequence in self._pinned.values():
            if _holds_blocks(sequence):
                self.truncate(sequence, 0)
                return True
        return False

    def release_pinned(self) -> None:
        """What was pinned is of no use any more."""
        for sequence in list(self._pinned.values()):
            self.release(sequence)

    def num_kept(self) -> list[int]:
        """Blocks a group in use by sequences that are neither expendable nor pinned."""
        tables = zip(*(sequence.block_tables for sequence in self._kept()))
        return [len({block for table in group for block in table} - {RELEASED}) for group in tables]

    @property
    def keeps_any(self) -> bool:
        """Whether a sequence that is neither expendable nor pinned has blocks, or a state."""
        return any(_holds_blocks(sequence) or sequence.state_slot is not None for sequence in self._kept())

    def stop_publishing(self) -> None:
        for sequence in self._sequences.values():
            sequence.publishable = False

    # -- prefixes from outside

    def find(
        self,
        token_ids: AbstractSequence[int],
        *,
        cache_salt: str | bytes | None,
        adapter: int,
        media: tuple[MediaSpan, ...],
    ) -> tuple[list[int], list[list[int]]] | None:
        """See `pinned.find`."""
        return find(self._tables, token_ids, cache_salt, adapter, media)

    def pin(
        self,
        name: str,
        token_ids: AbstractSequence[int],
        first_blocks: AbstractSequence[int],
        *,
        cache_salt: str | bytes | None,
        media: tuple[MediaSpan, ...],
    ) -> Filling:
        """A sequence that holds the blocks of a prefix: `settle_pin` when what is new was written, else `release` it.

        Raises CacheFull.
        """
        sequence = self.new(name, cache_salt=cache_salt, media=media)
        try:
            room = lambda: self.empty_one() or self._make_room()  # noqa: E731
            filling = pin(self._tables, sequence, token_ids, first_blocks, room, self._new_step())
        except BaseException:
            self.release(sequence)
            raise
        self._pinned[sequence.seq_id] = sequence
        return filling

    def settle_pin(self, filling: Filling, *, done: bool) -> None:
        """What was new is written; or it is not, then the sequence ends."""
        if done:
            publish(self._tables, filling)
        else:
            self._tables.take_back_moves(filling.step)
            self.release(filling.sequence)

    # -- one step

    def take_hit(self, sequence: Sequence, token_ids: list[int]) -> int:
        """Start the empty `sequence` with what the prefix cache holds of `token_ids`; returns how many tokens that is."""
        if not (self._tables.prefix_cache and sequence.publishable):
            return 0
        sequence.token_ids = list(token_ids)
        self._tables.take_hit(sequence, self._tables.longest_hit(sequence, on_device=True))
        del sequence.token_ids[sequence.num_computed :]
        return sequence.num_computed

    def plan(
        self, work: AbstractSequence[tuple[Sequence, list[int]]], *, release_unseen: bool
    ) -> tuple[StepPlan, StepBuilder]:
        """Give every sequence the blocks for its new tokens and pack them.

        Args:
            work: (sequence, its next tokens), at least one token each; a sequence comes once.
            release_unseen: let sliding groups give back what no later query sees. It cannot be truncated then.

        Raises CacheFull if the cache cannot hold them; the sequences are to be released.
        """
        step = StepBuilder(sum(len(tokens) for _, tokens in work), None, len(self._tables.pools))
        keep = {sequence.seq_id for sequence, _ in work}
        try:
            for sequence, tokens in work:
                sequence.token_ids += tokens
                if release_unseen:
                    self._tables.release_unseen(sequence)
                self._find_room(sequence, len(tokens), keep)
                self._tables.extend(sequence, len(tokens), step.changes)
                step.add(sequence, len(tokens), [])
        except CacheFull:
            self.rollback([sequence for sequence, _ in work], step)
            raise
        finally:
            step.changes.release_sources()
        return step.pack(self._new_step(), self._tables, {}), step

    def _find_room(self, sequence: Sequence, count: int, keep: Container[int]) -> None:
        while self._tables.room(sequence, count) < count:
            if not (self.empty_one(keep) or self._make_room() or self.empty_pinned()):
                raise CacheFull(
                    f"{sequence.request.request_id}: the KV cache has no blocks left for {count} more tokens beside "
                    f"{sequence.num_computed}; raise kv_cache_memory, or use fewer or shorter rows"
                )

    def commit(self, plan: StepPlan) -> None:
        """The plan was computed."""
        self._tables.settle_moves(plan.step)
        for seq_id, count in zip(plan.seq_ids, plan.num_new, strict=True):
            sequence = self._sequences.get(seq_id)
            if sequence is not None:
                sequence.num_computed += count

    def rollback(self, sequences: Iterable[Sequence], step: StepBuilder) -> None:
        """The plan failed: nobody may find the blocks it was to fill, and its sequences are good for `release` only."""
        step.changes.unpublish()
        if step.number is not None:
            self._tables.take_back_moves(step.number)
        for sequence in sequences:
            self.truncate(sequence, sequence.num_computed)

    # -- private

    def _kept(self) -> list[Sequence]:
        can_yield = self._expendable | self._pinned.keys()
        return [sequence for sequence in self._sequences.values() if sequence.seq_id not in can_yield]

    def _enter(self, request: Request, index: int) -> Sequence:
        sequence = Sequence(self._new_id(), request, index, _ORDER, len(self._tables.pools))
        sequence.status = SequenceStatus.RUNNING
        self._sequences[sequence.seq_id] = sequence
        return sequence


def _holds_blocks(sequence: Sequence) -> bool:
    return any(sequence.block_tables)
