"""An engine's KV cache while the engine lives: made larger or smaller, given back, taken again."""

from __future__ import annotations

from ..base.errors import InvalidArgument
from ..core.request import Request
from ..core.scheduler import Scheduler
from ..runtime.runner import ModelRunner
from .build import blocks_within, first_blocks, limits_of


class CacheMemory:
    """The memory of one engine's KV cache and recorded forwards. Everything here happens between two steps.

    Attributes:
        asleep: whether it has been given back.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler):
        self.asleep = False
        self._runner = runner
        self._cache = runner.cache
        self._scheduler = scheduler

    def oversized(self, memory: int) -> list[tuple[Request, str]]:
        """Requests that could never run in `memory` bytes, each with what to say of it. They are to be ended first.

        Raises InvalidArgument if nothing at all could.
        """
        least = sum(self._cache.bytes_per_block(group) for group in range(len(self._cache.groups)))
        least += self._scheduler.max_slots * self._cache.states.bytes_per_slot
        if memory < least:
            raise InvalidArgument(f"memory must be at least {least} bytes, for one block a layer, got {memory}")
        return self._scheduler.oversized(self._blocks_within(memory))

    def resize(self, memory: int) -> None:
        """Let the cache be as large as `memory` bytes allow; see `BatchEngine.resize_kv_cache`."""
        before = self._scheduler.max_blocks
        most = self._blocks_within(memory)
        moves = self._scheduler.resize(most)
        # On CPU it grows when it must; elsewhere a lack of memory is to show here.
        grows = self._cache.device.type == "cuda" and not self.asleep
        counts = [count if grows else min(count, have) for count, have in zip(most, self._cache.num_blocks)]
        try:
            self._runner.resize(counts, moves)
        except BaseException:
            self._scheduler.resize([min(pair) for pair in zip(before, most)])
            raise

    def _blocks_within(self, memory: int) -> list[int]:
        return blocks_within(self._cache, memory, self._scheduler.max_slots, limits_of(self._scheduler))

    def sleep(self) -> None:
        """Give back all of it. Whoever had blocks computes again what was in them."""
        self._scheduler.empty(first_blocks(self._cache.device, self._scheduler.max_blocks))
        self._runner.release()
        self.asleep = True

    def wake(self) -> None:
        """Take it again, where it is not to grow by itself."""
        if self.asleep:
            if self._cache.device.type == "cuda":
                self._runner.reserve(self._scheduler.max_blocks, min(self._scheduler.max_slots, self._scheduler.max_num_seqs))
            self.asleep = False
