"""Keys and values as an object: prefixes saved from an engine's cache, and loaded into that of another or a later one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from hf_paged_kernels import ops

from ..base.branch import Branch
from ..base.config import EngineConfig
from ..base.errors import CacheFull, InvalidArgument, QueueFull, UnsupportedOption
from ..base.types import RequestOutput
from ..core.groups import GroupSpec
from ..core.pinned import Filling
from ..core.request import Sequence
from ..runtime.kv_cache import KVCache
from ..runtime.kv_state import KVState, copy_in, copy_out

if TYPE_CHECKING:
    from ..core.scheduler import Scheduler
    from ..runtime.runner import ModelRunner, PagedModel
    from .intake import Intake
    from .lock import FairLock
    from .request_state import RequestState
    from .stepper import Stepper

_TRIES = 3
_COMPUTED = "computed"  # of a fingerprint: the digest of the model, whose parts have no names
_numbers = itertools.count()


class KVStates:
    """What BatchEngine offers of this."""

    model: PagedModel
    config: EngineConfig
    _cache: KVCache
    _intake: Intake
    _lock: FairLock
    _runner: ModelRunner
    _scheduler: Scheduler
    _stepper: Stepper
    _pinned: dict[str, Sequence]
    _digest: tuple[int, str] | None

    def save_kv(
        self,
        prompt: str | list[int] | list[dict] | Branch | RequestOutput,
        *,
        images=None,
        adapter: str | None = None,
        cache_salt: str | bytes | None = None,
    ) -> KVState:
        """The keys and values of a prompt, copied to the host: to be written to a file, or loaded by another engine.

        What the cache does not have is computed, in steps beside other requests. Whole blocks are saved, so the prompt's last
        tokens may be missing. The first time, and when weights have changed, all weights are read once to name them.

        Args:
            prompt: as in `add`; or a Branch of a request (`fork`), or a RequestOutput, with the tokens it has put out.
            images, cache_salt: as in `add`. The salt itself is not saved.
            adapter: None: adapters are not part of what a state can name.

        Raises:
            InvalidArgument, RequestTooLarge: the prompt is wrong, or too long; or shorter than a block.
            UnsupportedOption: keys and values cannot be saved here; the message says why.
            CacheFull: other requests evict the prompt before it can be copied.
        """
        self._check_kv("save_kv")
        if isinstance(prompt, RequestOutput):
            prompt = self.fork(prompt)
        adapter = prompt.adapter if isinstance(prompt, Branch) and adapter is None else adapter
        if adapter is not None:
            raise UnsupportedOption(f"adapter {adapter!r}: keys and values computed with an adapter are not saved")
        for _ in range(_TRIES):
            forgotten, found = self._fingerprint()
            state = self._intake.prefix(prompt, images, None, cache_salt)
            request = state.request
            length = len(request.prompt_token_ids) // self._cache.block_size * self._cache.block_size
            if not length:
                raise InvalidArgument(f"prompt has fewer tokens than a block ({self._cache.block_size})")
            self._compute(state)
            with self._between_steps():
                seeds = dict(cache_salt=request.cache_salt, adapter=request.adapter, media=request.media)
                blocks = self._scheduler.held.find(request.prompt_token_ids[:length], **seeds)
                if self.model.hooked:
                    raise UnsupportedOption("save_kv: forward hooks on the model see, and may change, every token")
                if blocks is not None and forgotten == self._stepper.num_forgotten:
                    return self._copied(request, length, *blocks, found)
        raise CacheFull("save_kv: other requests need the blocks, or weights change; raise kv_cache_memory, or try again")

    def _compute(self, state: RequestState) -> None:
        """Run a request that only computes its prompt."""
        while True:
            try:
                self.admit(state)
                break
            except QueueFull:
                self.step()
        try:
            while not state.finished:
                self.step()
        finally:
            self.release(state)
        state.raise_error()

    def _copied(self, request, length: int, firsts: list[int], blocks: list[list[int]], found: dict) -> KVState:
        read = lambda cache: [copy_out(cache, group, own) for group, own in enumerate(blocks)]  # noqa: E731
        return KVState(
            token_ids=request.prompt_token_ids[:length],
            fingerprint=found,
            block_size=self._cache.block_size,
            salted=request.cache_salt is not None,
            groups=[GroupSpec(group.window, group.chunk) for group in self._cache.groups],
            first_blocks=firsts,
            blocks=self._runner.beside(read),
            media=tuple(span for span in request.media if span.start < length),
        )

    def load_kv(self, state: KVState | str | Path, *, cache_salt: str | bytes | None = None) -> str:
        """Put saved keys and values into the cache: prompts that begin with its tokens have them as cached tokens.

        They stay there, however long nobody needs them, until `drop_kv`; but they give way where a request could not run
        beside them at all, or in a smaller cache (`resize_kv_cache`). New weights, `reset_prefix_cache` and `sleep` forget
        them, as all prefixes.

        Args:
            state: what `save_kv` gave, or the path of a file with it.
            cache_salt: requests of this salt find them. Needed for what was saved under one, and may be another.

        Returns an id for `drop_kv`.

        Raises:
            OSError: the file cannot be read.
            InvalidArgument: it is no such file, or was damaged; or the state is of another model, or another kind of cache.
            UnsupportedOption: keys and values cannot be loaded here; the message says why.
            CacheFull: it does not fit beside what others cannot give up.
        """
        self._check_kv("load_kv")
        if not isinstance(state, KVState):
            if not isinstance(state, str | Path):
                raise InvalidArgument(f"state must be a KVState or a path, got {type(state).__name__}")
            state = KVState.load(state)
        if state.salted and cache_salt is None:
            raise InvalidArgument("cache_salt: the state was saved under a salt, so it needs one: this or another")
        if cache_salt is not None and not isinstance(cache_salt, str | bytes):
            raise InvalidArgument(f"cache_salt must be a string or bytes, got {type(cache_salt).__name__}")
        for _ in range(_TRIES):
            forgotten, found = self._fingerprint()
            _check_same(state, found)
            self._check_parts(state)
            with self._between_steps():
                if forgotten == self._stepper.num_forgotten:
                    return self._pin(state, cache_salt)
        raise InvalidArgument("state: the model's weights change all the while; load it when they do not")

    def _pin(self, state: KVState, cache_salt: str | bytes | None) -> str:
        self._memory.wake()
        held, name = self._scheduler.held, f"kv-{next(_numbers)}"
        filling = held.pin(name, state.token_ids, state.first_blocks, cache_salt=cache_salt, media=state.media)
        done = False
        try:
            self._runner.beside(lambda cache: _fill(cache, filling, state), filling.num_blocks, filling.moves)
            done = True
        finally:
            held.settle_pin(filling, done=done)
        self._pinned[name] = filling.sequence
        return name

    def drop_kv(self, name: str) -> None:
        """What `load_kv` put into the cache need not stay there. As long as nobody needs the room, it is found still.

        Raises InvalidArgument for what `load_kv` did not return, or was dropped before.
        """
        with self._lock:
            sequence = self._pinned.pop(name, None) if isinstance(name, str) else None
            if sequence is None:
                raise InvalidArgument(f"name {name!r} is none that load_kv returned, or was dropped before")
            self._scheduler.held.release(sequence)

    def _check_kv(self, name: str) -> None:
        self._check_open()
        if self.model.team is not None:
            raise UnsupportedOption(f"{name}: the blocks of a sharded model lie in several processes")
        if self.has_state:
            raise UnsupportedOption(
                f"{name}: this model's layers keep a running state, and blocks of the others are of no use without it"
            )
        if not self.config.prefix_cache:
            raise UnsupportedOption(f"{name} works on the prefix cache; use EngineConfig(prefix_cache=True)")

    def _fingerprint(self) -> tuple[int, dict[str, str]]:
        """(as of which weights, what keys and values of this engine are good for)."""
        with self._lock:
            forgotten, digest = self._stepper.num_forgotten, self._digest
        if digest is None or digest[0] != forgotten:
            digest = self._digest = forgotten, self.model.fingerprint()
        layers = [(group.window, group.chunk, group.values_in_keys, group.layers) for group in self._cache.groups]
        return forgotten, {
            "block_size": str(self._cache.block_size),
            "dtype": str(self._cache.dtype),
            "layers": str(layers),
            "layout": f"{ops.resolve_backend(self.config.attention_backend, self._cache.device)} on {self._cache.device.type}",
            "exact": str(self.config.exact),
            _COMPUTED: digest[1],
        }

    def _check_parts(self, state: KVState) -> None:
        try:
            state.check()
        except ValueError as error:
            raise InvalidArgument(f"state: {error}") from error
        sizes = [self._cache.bytes_per_block(group) for group in range(len(self._cache.groups))]
        if [blocks.shape[1] for blocks in state.blocks] != sizes:
            raise InvalidArgument(f"state has blocks of {[blocks.shape[1] for blocks in state.blocks]} bytes, not {sizes}")
        if not 0 <= min(state.token_ids) <= max(state.token_ids) < self.model.vocab_size:
            raise InvalidArgument("state has token ids outside the vocabulary")


def _check_same(state: KVState, expected: dict[str, str]) -> None:
    """Raise InvalidArgument unless the state is of such a model and cache."""
    found = state.fingerprint
    for part, here in expected.items():
        if part != _COMPUTED and found.get(part) != here:
            raise InvalidArgument(f"state was made with another {part}: {found.get(part)}; here it is {here}")
    if found.get(_COMPUTED) != expected[_COMPUTED]:
        raise InvalidArgument(
            "state was computed by another model or other weights, or by other versions of hf_paged, transformers or torch, on "
            "another kind of machine, or with another number of threads"
        )


def _fill(cache: KVCache, filling: Filling, state: KVState) -> None:
    for group, (new, first) in enumerate(zip(filling.new, state.first_blocks, strict=True)):
        if new:
            rows = state.blocks[group][[place - first for place, _ in new]]
            copy_in(cache, group, [block for _, block in new], rows)
