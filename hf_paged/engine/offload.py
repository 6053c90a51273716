"""Host memory behind an engine's KV cache, and when it is worth the way."""

from __future__ import annotations

from ..base.offload import Offload
from ..core.host_tier import HostTier
from ..runtime.host_cache import HostCache
from ..runtime.kv_cache import KVCache
from ..runtime.layout import blocks_for_budget, slots_for_budget
from ..runtime.runner import as_in_a_step

_NEWEST = 0.2  # weight of the last measured step


class HostOffload:
    """The host memory of one engine.

    Whether a preempted sequence is copied there or computed again is decided by what takes less time:

        bytes out and back / measured bandwidth    against    tokens / measured speed of steps that compute prompts

    Attributes:
        bandwidth: bytes a second to the host; None before `tier`.
        speed: tokens a second. None until it was measured; till then everything is copied.
    """

    def __init__(self, config: Offload):
        self.bandwidth: float | None = None
        self.speed: float | None = None
        self._memory = config.memory
        self._cache: KVCache | None = None
        self._tier: HostTier | None = None
        self._most_decodes = 0

    def tier(
        self, cache: KVCache, *, max_batch_tokens: int, max_num_seqs: int, keeps_prefixes: bool
    ) -> HostTier:
        """Give `cache` host memory. Returns what says which block is where in it.

        Args:
            max_batch_tokens, max_num_seqs: what steps stay within.
            keeps_prefixes: evicted prefixes go there.
        """
        self._cache, self._most_decodes = cache, max_num_seqs
        slot_bytes = cache.states.bytes_per_slot
        num_states = slots_for_budget(slot_bytes, self._memory // 2 if cache.groups else self._memory, max_num_seqs)
        most = blocks_for_budget(
            cache.groups,
            budget=self._memory - num_states * slot_bytes,
            block_size=cache.block_size,
            dtype=cache.dtype,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
        )
        cache.host = HostCache(cache, most, num_states)
        with as_in_a_step(cache.device):
            cache.ensure([1] * len(cache.groups))
            cache.states.ensure(min(num_states, 1))
            self.bandwidth = cache.host.bandwidth()
        self._tier = HostTier(
            most, max_states=num_states, prefers_swap=self.prefers_swap, keeps_prefixes=keeps_prefixes
        )
        return self._tier

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step took so long. Those with more tokens than there may be decodes tell how fast prompts are computed."""
        if num_tokens > self._most_decodes:
            speed = num_tokens / seconds
            self.speed = speed if self.speed is None else (1 - _NEWEST) * self.speed + _NEWEST * speed

    def prefers_swap(self, num_tokens: int, num_blocks: list[int], num_states: int) -> bool:
        """Whether to copy so many blocks a group, and states, rather than to compute so many tokens again."""
        if self.speed is None:
            return True
        return 2 * self._num_bytes(num_blocks, num_states) / self.bandwidth < num_tokens / self.speed

    def stats(self) -> dict[str, int]:
        """Bytes taken of the host, bytes there may be, and bytes of prefixes and preempted sequences there now."""
        pools = self._tier.pools
        in_use = [pool.num_in_use + pool.num_cached for pool in pools]
        return {
            "host_bytes_allocated": self._cache.host.bytes_allocated,
            "host_bytes_limit": self._num_bytes([pool.max_blocks for pool in pools], self._tier.states.max_blocks),
            "host_bytes_in_use": self._num_bytes(in_use, self._tier.states.num_in_use),
        }

    def _num_bytes(self, num_blocks: list[int], num_states: int) -> int:
        blocks = sum(self._cache.bytes_per_block(group) * count for group, count in enumerate(num_blocks))
        return blocks + num_states * self._cache.states.bytes_per_slot
