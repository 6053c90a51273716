"""What is done to a scheduler between its steps: weights that changed, hooks that watch, a cache of another size."""

from __future__ import annotations

from ..base.errors import CacheFull
from .held import HeldSequences
from .planner import Planner
from .queues import Queues
from .request import Request, Sequence
from .resize import make_room, why_too_large
from .tables import BlockTables
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
