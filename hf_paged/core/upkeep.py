"""What is done to a scheduler between its steps: weights that changed, hooks that watch, a cache of another size."""

from __future__ import annotations

from ..base.errors import CacheFull
from .held import HeldSequences
from .media import rest_of_block
from .planner import Planner
from .queues import Queues
from .request import Request, Sequence, SequenceStatus
from .resize import make_room, why_too_large
from .tables import RELEASED, BlockTables
from .under_way import UnderWay


class SchedulerUpkeep:
    """A part of `Scheduler`, which sets all this."""

    requests: dict[str, Request]
    held: HeldSequences
    max_model_len: int
    _prefix_cache: bool
    _tables: BlockTables
    _queues: Queues
    _planner: Planner
    _under_way: UnderWay
    _sequences: dict[int, Sequence]

    # -- weights and hooks

    def share_prefixes(self, allowed: bool) -> None:
        """Switch the prefix cache off and on again: while it is off, no block is found or published.

        Does nothing to a scheduler made without one. Whatever is to be forgotten takes `reset_prefix_cache`.
        """
        self._tables.prefix_cache = allowed and self._prefix_cache

    def reset_prefix_cache(self) -> None:
        """The weights changed: no later request may find a block computed so far.

        Running sequences keep their keys and values, computed under the old weights, and publish no more blocks;
        `recompute_all` makes them start over too.
        """
        self._tables.clear_cache()
        self.held.release_pinned()
        self.held.stop_publishing()
        for seq in self._queues.running:
            seq.publishable = False

    def recompute_all(self) -> None:
        """`reset_prefix_cache`, and all running sequences recompute everything under the new weights.

        Plans that are under way are rolled back. Outputs so far are kept. Not counted as preemption.
        """
        self._under_way.take_back(launched=True)
        self.reset_prefix_cache()
        for seq in list(self._queues.running):
            self._planner.send_back(seq)

    # -- tokens that are taken back

    def roll_back(self, seq: Sequence, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of an unfinished sequence, which has the others from steps that are done.

        Its prompt stays. What it has computed of the rest it keeps, but for the last, from which it goes on; unless its
        layers have given back what that one sees, or keep a state: then it computes all again.
        """
        self._under_way.take_back()
        if num_tokens == len(seq.token_ids):
            return
        assert seq.num_prompt <= num_tokens < len(seq.token_ids) and not seq.num_unknown
        del seq.token_ids[num_tokens:]
        kept = num_tokens - 1
        if seq.num_computed > kept and seq.status is SequenceStatus.RUNNING and self._may_truncate(seq, kept):
            self._tables.truncate(seq, kept)
        elif seq.status is SequenceStatus.WAITING:
            self._tables.release(seq)
        elif seq.num_computed > kept:
            self._planner.send_back(seq)
        del seq.block_keys[num_tokens // self._tables.block_size :]

    def _may_truncate(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether `seq` can go on after its first `num_tokens` tokens with the blocks it has."""
        tables = self._tables
        if tables.has_state or rest_of_block(seq.request.media, num_tokens) > 1:
            return False
        unseen = (group.num_unseen_blocks(num_tokens, tables.block_size) for group in tables.groups)
        return all(RELEASED not in table[first:] for first, table in zip(unseen, seq.block_tables, strict=True))

    # -- the size of the cache

    def oversized(self, max_blocks: list[int]) -> list[tuple[Request, str]]:
        """Unfinished requests that could never run with `max_blocks` blocks a group, each with what to say of it."""
        reasons = (
            (request, why_too_large(self._tables, request, max_blocks, self.max_model_len))
            for request in self.requests.values()
        )
        return [(request, reason) for request, reason in reasons if reason is not None]

    def resize(self, max_blocks: list[int]) -> list[dict[int, int]]:
        """Change the number of blocks a group may have, between two steps.

        Blocks in use are kept, and move where they must; as long as they are too many, held sequences that can do without
        are emptied and running ones preempted, last in order first. Whatever is `oversized` must have been ended.

        Returns per group which blocks' contents have to go where, {old: new}.

        Raises CacheFull, and changes nothing, if held sequences need more.
        """
        self._under_way.take_back()
        make_room(self._tables, self.held, self._planner, max_blocks)
        return self._tables.resize(max_blocks, [*self._sequences.values(), *self.held])

    def empty(self, num_blocks: list[int]) -> None:
        """Take all blocks and states from everybody, and begin anew with so many blocks a group.

        As `recompute_all`; held sequences that can do without are emptied.

        Raises CacheFull, and changes nothing, if held sequences have blocks that nobody could compute again.
        """
        if self.held.keeps_any:
            raise CacheFull(
                "rows of generate, or a cache it returned, hold keys and values that cannot be computed again; let it end, "
                "or delete the cache, first"
            )
        self.recompute_all()
        while self.held.empty_one():
            pass
        self._tables.reset(num_blocks)
