"""What is done to an engine between two steps: its adapters, its memory, its numbers."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, RequestTooLarge, UnsupportedOption
from ..base.sizes import parse_bytes
from ..base.types import AdapterInfo
from ..runtime.graphs import DecodeGraphs
from .trace import StepTrace

if TYPE_CHECKING:
    from ..core.scheduler import Scheduler
    from ..runtime.kv_cache import KVCache
    from ..runtime.media import EncoderOutputs
    from ..runtime.runner import ModelRunner, PagedModel
    from .lock import FairLock
    from .memory import CacheMemory
    from .offload import HostOffload
    from .open_requests import OpenRequests
    from .stepper import Stepper


class Upkeep:
    """What BatchEngine offers beside requests and steps. All of it may be called from any thread."""

    model: PagedModel
    config: EngineConfig
    _cache: KVCache
    _encoder: EncoderOutputs | None
    _lock: FairLock
    _memory: CacheMemory
    _offload: HostOffload | None
    _requests: OpenRequests
    _runner: ModelRunner
    _scheduler: Scheduler
    _stepper: Stepper
    _stepping: bool

    # Adapters

    def load_adapter(
        self, name: str, source, *, adapter_name: str | None = None, max_rank: int | None = None
    ) -> AdapterInfo:
        """Load a PEFT adapter, for requests that name it. Others run on meanwhile; the last part waits for a step's end.

        Args:
            name: what requests call it.
            source: the folder of a saved adapter (adapter_config.json and adapter_model.safetensors); or a PeftModel
                around this model, or around another of the same structure, whose adapter is used as it is at each step.
            adapter_name: which adapter of the PeftModel, where it has several.
            max_rank: refuse a LoRA adapter of a higher rank.

        Raises:
            InvalidArgument: the name is taken, the folder holds no sound adapter, or it is none of this model.
            UnsupportedOption: such adapters cannot run beside others; the message says why.
        """
        if self.model.team is not None:
            raise UnsupportedOption("load_adapter: adapters are not sharded, and this model is")
        loaded = self.model.adapters.read(name, source, adapter_name, max_rank)
        with self._between_steps():
            return self.model.take_adapter(loaded, self.config)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InvalidArgument while requests have it, and for a name that is not loaded."""
        with self._between_steps():
            if name not in self.adapters:
                raise InvalidArgument(f"adapter {name!r} is not loaded; there is {sorted(self.adapters) or 'none'}")
            number = self.model.adapters.number(name)
            users = self._scheduler.users_of(number)
            if users:
                raise InvalidArgument(f"adapter {name!r} cannot be unloaded: {users} unfinished requests have it")
            self.model.adapters.remove(name)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self.model.adapters.infos

    # Memory

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, encoded image and CUDA graph; for models changed in ways the engine cannot see.

        With blocks on a disk (`Offload.disk`), those of this model are deleted.
        """
        with self._lock:
            if not self._stepping:
                self._stepper.take_back()
            self._stepper.forget_computed()
            if self._offload is not None:
                self._offload.delete()
            for graphs in self._runner.all_graphs:
                graphs.clear()

    def resize_kv_cache(self, memory: int | str) -> None:
        """Let the KV cache be larger or smaller from now on, for example beside training.

        Running requests keep what they have in it; as far as they no longer fit, the last come wait and are computed
        again. Requests that could never run in what is left end with RequestTooLarge.

        Args:
            memory: most bytes, as an int or a string such as "2GiB"; states of layers that keep one included.

        Raises:
            InvalidArgument: it is not enough for anything.
            CacheFull: rows of `generate` under way, or a cache it returned, hold more than that.
        """
        memory = parse_bytes("memory", memory)
        with self._between_steps():
            for request, reason in self._memory.oversized(memory):
                self._requests.end_with(request.state, RequestTooLarge(reason))
            self._memory.resize(memory)

    def sleep(self) -> None:
        """Give the memory of the KV cache and of CUDA graphs back, until `wake_up` or the next step.

        Running requests keep their outputs and wait; they go on where they were once their tokens are computed again.
        Cached prefixes and encoded images are forgotten.

        Raises CacheFull if rows of `generate` under way, or a cache it returned, hold what nobody could compute again.
        """
        with self._between_steps():
            if self._speculator is not None:
                self._speculator.sleep()
            if self._encoder is not None:
                self._encoder.clear()
            self._memory.sleep()

    def wake_up(self) -> None:
        """Take the memory that `sleep` gave back, now rather than with the next step. Raises if it is not there."""
        with self._between_steps():
            self._memory.wake()

    @property
    def sleeping(self) -> bool:
        """Whether the memory of the cache has been given back."""
        return self._memory.asleep

    @contextmanager
    def _between_steps(self):
        """Scope in which no step runs, and none is in flight. What that one brought, the next step tells."""
        with self._lock:
            self._check_open()
            if self._stepping:
                raise InvalidArgument(
                    "the cache cannot change in the middle of a step (in a processor, criterion or hook)"
                )
            self._stepping = True
            try:
                self._release_dropped()
                self._stepper.drain()
                yield
            finally:
                self._stepping = False

    # Numbers

    @contextmanager
    def trace(self, path: str | Path):
        """Write where the time of every step inside goes to a file, for chrome://tracing or ui.perfetto.dev.

        Shown are the phases of `metrics.StepClock` in each step, and beside them the requests that run and wait, and the
        bytes of keys and values that they hold. What a GPU does meanwhile is not.

        Raises:
            OSError: the file cannot be written.
            InvalidArgument: a trace is being written already.
        """
        with self._lock:
            if self._stepper.clock.trace is not None:
                raise InvalidArgument("trace: one is being written already")
            open(path, "w").close()
            self._stepper.clock.trace = trace = StepTrace()
        try:
            yield
        finally:
            with self._lock:
                self._stepper.clock.trace = None
            trace.write(path)

    def _trace_amounts(self) -> None:
        stats = self._scheduler.stats()
        held = sum(self._cache.bytes_per_block(group) * count for group, count in enumerate(stats["blocks_in_use"]))
        trace = self._stepper.clock.trace
        trace.amounts("requests", running=stats["running"], waiting=stats["waiting"])
        trace.amounts("KV cache", bytes=held)

    @property
    def graphs(self) -> DecodeGraphs | None:
        """Recorded forwards of decode steps, where there are any."""
        return self._runner.graphs

    @property
    def adapted_graphs(self) -> DecodeGraphs | None:
        """Those of steps in which somebody has an adapter."""
        return self._runner.adapted_graphs

    def stats(self) -> dict:
        """Counts since the last `reset_stats`, and memory in bytes now.

        `kv_bytes_in_use` and `kv_bytes_peak` count blocks that running requests hold; `kv_bytes_allocated` is what the
        cache takes from the machine; the `state_bytes` of layers that keep a state likewise. `adapter_bytes` are those of
        loaded adapters. `encoded_tokens` are those of images that the encoder computed, `encoder_cache_bytes` what is kept of
        them. `cuda_graphs` batch sizes of decode steps are recorded so far, which keep `cuda_graph_bytes`.
        Of the `preemptions`, `swaps_out` went to host memory and `swaps_in` came back from there; `host_hit_tokens` of the
        `prefix_hit_tokens` came from there, too; with `offload`, `host_bytes_in_use` of at most `host_bytes_limit` are
        there, in `host_bytes_allocated`; `host_bytes_out` and `host_bytes_back` were copied since the engine was opened.
        With a disk behind that, `disk_hit_tokens` were read from it, and its folder has `disk_files` of `disk_bytes` (at most
        `disk_bytes_limit`); `disk_skipped_blocks` were not written, as it was too slow.
        `draft_tokens` were guessed, `accepted_tokens` of them were right and `acceptance_rate` is their share (None if
        nothing was guessed). `forced_tokens` took no step of their own, as a form left no choice about them. `overtakes`
        counts requests that went before others because of a cached prefix; with policy "fair", `users` have requests,
        `users_waiting` of them some that wait, and `service_gap` is how far apart those are by what they were served (a
        prompt's token 1, one put out 2). Times are the host's, in seconds, by the phases of `metrics.StepClock`:
        `time_model` is the forward (on CUDA starting it, and waiting for the device), `time_draft` what looking ahead took,
        the rest is the engine's own (`time_build` packs the batch, and grows the cache when it must).
        `shared_prefix_tokens` counts the tokens of shared prefixes that a layer read for several sequences at once instead
        of for each.
        """
        with self._lock:
            scheduler = self._scheduler.stats()
            size, slot_size = self._cache.bytes_per_block, self._cache.states.bytes_per_slot
            in_use, peak = scheduler.pop("blocks_in_use"), scheduler.pop("blocks_peak")
            drafted, accepted = scheduler["draft_tokens"], scheduler["accepted_tokens"]
            return {
                **scheduler,
                "acceptance_rate": accepted / drafted if drafted else None,
                **self._stepper.clock.stats(),
                "shared_prefix_tokens": self._runner.prefixes.saved_tokens if self._runner.prefixes else 0,
                "kv_bytes_allocated": self._cache.bytes_allocated,
                "kv_bytes_in_use": sum(size(i) * count for i, count in enumerate(in_use)),
                "kv_bytes_limit": sum(size(i) * count for i, count in enumerate(scheduler["blocks_total"])),
                "kv_bytes_peak": sum(size(i) * count for i, count in enumerate(peak)),
                "cuda_graphs": sum(len(graphs.recorded) for graphs in self._runner.all_graphs),
                "cuda_graph_bytes": sum(graphs.num_bytes for graphs in self._runner.all_graphs),
                **(self._offload.stats() if self._offload else {}),
                "adapter_bytes": self.model.adapters.num_bytes,
                "encoded_tokens": self._encoder.encoded_tokens if self._encoder else 0,
                "encoder_cache_bytes": self._encoder.num_bytes if self._encoder else 0,
                "state_bytes_allocated": self._cache.states.bytes_allocated,
                "state_bytes_in_use": slot_size * scheduler["slots_in_use"],
                "state_bytes_peak": slot_size * scheduler["slots_peak"],
            }

    def reset_stats(self) -> None:
        with self._lock:
            self._stepper.clock.reset()
            if self._encoder is not None:
                self._encoder.encoded_tokens = 0
            if self._runner.prefixes is not None:
                self._runner.prefixes.saved_tokens = 0
            self._scheduler.reset_stats()

    def check_integrity(self) -> None:
        """Assert that every block is accounted for."""
        with self._lock:
            self._scheduler.check_integrity()
