"""Host memory, and a disk, behind an engine's KV cache, and when they are worth the way."""

from __future__ import annotations

from collections.abc import Callable

from ..base.errors import UnsupportedOption
from ..base.offload import Offload
from ..core.host_tier import HostTier
from ..runtime.disk_cache import DiskCache
from ..runtime.host_cache import CopyTime, HostCache
from ..runtime.kv_cache import KVCache
from ..runtime.layout import blocks_for_budget, slots_for_budget
from ..runtime.runner import as_in_a_step

_MANY = 64  # tokens; smaller steps take about as long as with fewer
_HALF_LIFE = 4096  # tokens after which a measured step weighs half


class HostOffload:
    """The host memory of one engine.

    Whether something is copied or computed again is decided by what takes less time, both as measured on this machine:

        ways * (a copy's overhead + bytes / bandwidth)    against    tokens / speed of steps that compute prompts

    What is preempted goes out and comes back; a prefix that was evicted there only comes back. One on the disk is read
    first, at the speed of late.

    Attributes:
        copying: what a copy one way takes, measured by `tier`; None before.
    """

    def __init__(self, config: Offload):
        self.copying: CopyTime | None = None
        self._tokens = self._seconds = 0.0  # of steps that computed prompts, the newest counting most
        self._config, self._memory = config, config.memory
        self._cache: KVCache | None = None
        self._tier: HostTier | None = None
        self._disk: DiskCache | None = None

    def tier(
        self,
        cache: KVCache,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        keeps_prefixes: bool,
        exact: bool,
        begin_fingerprint: Callable[[], Callable[[], str]],
    ) -> HostTier:
        """Give `cache` host memory. Returns what says which block is where in it.

        Args:
            max_batch_tokens, max_num_seqs: what steps stay within.
            keeps_prefixes: evicted prefixes go there.
            exact: keys and values are those of exact mode.
            begin_fingerprint: of the model; see `PagedModel`.

        Raises InvalidArgument if there is to be a disk that cannot be written, UnsupportedOption if nothing would be.
        """
        if self._config.disk is not None and not keeps_prefixes:
            why = "the model's layers keep a state" if cache.states.bytes_per_slot else "prefix_cache is False"
            raise UnsupportedOption(f"offload: there are no prefixes to keep on a disk, as {why}; use disk=None")
        self._cache = cache
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
            self.copying = cache.host.measure()
            if self._config.disk is not None:
                cache.host.disk = self._disk = self._make_disk(cache, exact, begin_fingerprint)
        self._tier = HostTier(
            most,
            max_states=num_states,
            prefers_copy=self.prefers_copy,
            keeps_prefixes=keeps_prefixes,
            disk=self._disk,
            prefers_read=self.prefers_read,
        )
        return self._tier

    def _make_disk(
        self, cache: KVCache, exact: bool, begin_fingerprint: Callable[[], Callable[[], str]]
    ) -> DiskCache:
        return DiskCache(
            self._config.disk,
            self._config.disk_memory,
            layout=f"{cache.layout} {exact}",
            row_bytes=[cache.host.row_bytes(group) for group in range(len(cache.groups))],
            begin_fingerprint=begin_fingerprint,
            in_background=cache.device.type != "cuda",  # there it would copy beside forwards that are being recorded
        )

    @property
    def speed(self) -> float | None:
        """Tokens of prompts that are computed in a second. None until it was measured; till then everything is copied."""
        return self._tokens / self._seconds if self._tokens else None

    def computed(self, num_tokens: int, seconds: float, num_running: int) -> None:
        """A step took so long. Those that computed prompts, more than tokens of those running, tell how fast that is."""
        if num_tokens >= max(_MANY, 2 * num_running):
            kept = 0.5 ** (num_tokens / _HALF_LIFE)
            self._tokens = kept * self._tokens + num_tokens
            self._seconds = kept * self._seconds + seconds

    def prefers_copy(self, num_tokens: int, num_blocks: list[int], num_states: int, ways: int) -> bool:
        """Whether to copy so many blocks a group, and states, one way or both, rather than to compute so many tokens again."""
        if not self._tokens:
            return True
        copying = ways * (self.copying.overhead + self._num_bytes(num_blocks, num_states) * self.copying.per_byte)
        return copying < num_tokens / self.speed

    def prefers_read(self, num_tokens: int, num_blocks: list[int]) -> bool:
        """Whether to read so many blocks a group from the disk, and copy them on, rather than to compute so many tokens."""
        per_byte = self._disk.per_byte
        if not self._tokens or per_byte is None:
            return True
        reading = self.copying.overhead + self._num_bytes(num_blocks, 0) * (self.copying.per_byte + per_byte)
        return reading < num_tokens / self.speed

    def stats(self) -> dict[str, int]:
        """Bytes taken of the host, bytes there may be, and bytes of prefixes and preempted sequences there now; and those
        copied so far.
        """
        pools = self._tier.pools
        in_use = [pool.num_in_use + pool.num_cached for pool in pools]
        return {
            "host_bytes_allocated": self._cache.host.bytes_allocated,
            "host_bytes_limit": self._num_bytes([pool.max_blocks for pool in pools], self._tier.states.max_blocks),
            "host_bytes_out": self._cache.host.bytes_out,
            "host_bytes_back": self._cache.host.bytes_back,
            "host_bytes_in_use": self._num_bytes(in_use, self._tier.states.num_in_use),
            **(self._disk.stats() if self._disk else {}),
        }

    def look(self) -> None:
        """Between two steps: find out whose the blocks on disk are, if that is due."""
        if self._disk is not None:
            self._disk.look()

    def forget(self) -> None:
        """The model has changed. What is on disk is not its, nor is anything more written there, until it is known whose it is."""
        if self._disk is not None:
            self._disk.forget()

    def delete(self) -> None:
        """Delete what is on disk of the model, and begin anew with the model as it is now."""
        if self._disk is not None:
            self._disk.delete()

    def close(self) -> None:
        """Let the disk have all prefixes that are here, while they are. No step is under way."""
        if self._disk is not None:
            with as_in_a_step(self._cache.device):
                self._cache.host.store(*self._tier.storable())
            self._disk.close()

    def _num_bytes(self, num_blocks: list[int], num_states: int) -> int:
        blocks = sum(self._cache.bytes_per_block(group) * count for group, count in enumerate(num_blocks))
        return blocks + num_states * self._cache.states.bytes_per_slot
