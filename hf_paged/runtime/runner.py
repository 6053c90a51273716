"""Runs one StepPlan through a model: grow and copy blocks, pack the batch, forward, logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import numpy as np
import torch

from hf_paged_kernels import ops

from ..base.config import EngineConfig
from ..base.types import AdapterInfo
from ..core.plan import StepPlan, TierMoves
from ..parallel.team import Team
from .adapters import Adapters, part_of
from .batch import SequenceHooks, StepContext
from .graphs import DecodeGraphs
from .inputs import Inputs
from .kv_cache import KVCache
from .layout import LayerSpec
from .media import MediaModel
from .packed import Owner
from .shared_prefix import READINGS, PrefixSharing
from .states import StateSpec
from .transfer import to_device

T = TypeVar("T")


class PagedModel(Protocol):
    """What the engine needs of a model; the hf room provides it for transformers models."""

    layers: list[LayerSpec]
    states: list[StateSpec]  # layers that keep a state per sequence
    vocab_size: int
    max_model_len: int  # positions the model was made for
    length_limit: int  # most positions it may be given
    length_note: str | None
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    adapters: Adapters

    name: str  # of its class
    hidden_size: int | None  # of its hidden states after the last norm; None if it does not show them
    pooling: str  # of them into one vector, unless a request says otherwise; see EmbedParams
    generates: bool  # whether its head gives logits of next tokens
    labels: list[str]  # by name, what a head for classifying tells apart; empty without one
    activation: str  # of that head's logits, unless a request says otherwise; see ClassifyParams
    team: Team | None  # the ranks of a sharded model
    media: MediaModel | None  # what it does with images; None: it takes none

    def forward(self, context: StepContext, rows: torch.Tensor) -> torch.Tensor:
        """What the head makes of the packed rows `rows` [R] of `context`'s batch. Runs `context.hooks`.

        Logits [R, V] of next tokens, [R, C] of labels, or without a head [R, H] the hidden states themselves.
        `context.hidden` is set where it is needed. Rows that `context.embeddings` names have these for their tokens'.
        """
        ...

    def classified(self, token_ids: list[int]) -> list[int]:
        """The tokens of a text up to the one whose hidden state the head for classifying gets."""
        ...

    @property
    def finds_winners(self) -> bool:
        """Whether `winners` does less than `forward`."""
        ...

    def winners(self, context: StepContext, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the logits that `forward` would return, each row's first largest: (tokens int64 [R], logits [R])."""
        ...

    def part(self, context: StepContext, rows: torch.Tensor) -> torch.Tensor:
        """What this rank has of what `forward` would return: all, unless the output embedding is split."""
        ...

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """What `forward` would return, of every rank's `part`."""
        ...

    def winners_of(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `winners` would return, of every rank's `part`."""
        ...

    def unobserved(self) -> AbstractContextManager:
        """Scope in which no forward hook of the user's runs."""
        ...

    def check_module(self, name: str) -> None:
        """Raise InvalidArgument unless a function on activations can run on the outputs of a module of that name."""
        ...

    def take_adapter(self, loaded: object, config: EngineConfig) -> AdapterInfo:
        """Let requests have an adapter that `adapters.read` gave. Between steps only.

        Raises InvalidArgument if the model does not run with it, KernelUnavailable if `config` is strict and it is slow.
        """
        ...

    def weights_changed(self) -> bool:
        """Whether anything that decides the outputs (weights, adapters, hooks) differs from the last call's.

        Cheap enough to ask before every step.
        """
        ...

    @property
    def hooked(self) -> list[int]:
        """Where, at the last look, user code ran inside the forward, which may treat every request differently.

        By numbers that are the same on all ranks of a sharded model; empty if nowhere.
        """
        ...

    @property
    def generation(self) -> int:
        """Counts what `weights_changed` noticed and a recorded forward would not: all but new values in old places."""
        ...

    @property
    def why_unrecordable(self) -> str | None:
        """Why, at the last look, a recorded forward would not do what the model's own does; None if it would."""
        ...

    def weights_replaced(self) -> bool:
        """A second, slower look that also finds writes behind autograd's back; asked when work starts."""
        ...

    def fingerprint(self) -> str:
        """A digest of all that decides which keys and values tokens get, the same in every process. Reads all weights.

        Raises UnsupportedOption if user code takes part in that.
        """
        ...

    def begin_fingerprint(self) -> Callable[[], str]:
        """`fingerprint` in two parts: this one between forwards, the function, which reads the weights, by any thread."""
        ...


def on_device(device: torch.device):
    """A context in which `device` is the current one, where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class StreamOrder:
    """Keeps the steps of one cache in order on the device: what one writes, the next reads, and nobody waits in between.

    Callers may be on different streams: a step then begins, on the device, when the stream of the step before it has got
    as far as it was given.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def follow(self, sampled: torch.Tensor | None) -> None:
        """A step begins on the current stream; `sampled` is what it takes from the one before."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
            if sampled is not None:
                sampled.record_stream(stream)  # its memory is not given away before this step has read it
        self._last = stream


@contextmanager
def as_in_a_step(device: torch.device):
    """On `device`, without autograd, inference mode or autocast, whatever the caller has on."""
    with on_device(device), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class ModelRunner:
    """Owns the KV cache of one model and executes plans on it.

    Attributes:
        graphs: recorded forwards of decode steps; None: every forward is the model's own. They need StagedInputs.
        adapted_graphs: the same of steps in which somebody has an adapter.
        prefixes: finds what decodes share; None where the attention kernels make no use of it.
    """

    finds_winners = False  # whether `winners` does less than `forward`

    def __init__(
        self,
        model: PagedModel,
        cache: KVCache,
        inputs: Inputs,
        *,
        backend: str,
        graphs: DecodeGraphs | None = None,
        adapted_graphs: DecodeGraphs | None = None,
    ):
        self.model = model
        self.cache = cache
        self.backend = backend
        self.graphs = graphs
        self.adapted_graphs = adapted_graphs
        self._inputs = inputs
        self._order = StreamOrder(cache.device)
        self.prefixes: PrefixSharing | None = None
        kernels = ops.resolve_backend(backend, cache.device)
        if kernels in READINGS:
            self.prefixes = PrefixSharing(
                cache.groups, backend=kernels, block_size=cache.block_size, dtype=cache.dtype, device=cache.device
            )

    def prepare(
        self,
        plan: StepPlan,
        owner: Callable[[int], Owner] | None = None,
        hooks: SequenceHooks | None = None,
        *,
        rows: Sequence[int] = (),
        sampled: torch.Tensor | None = None,
        hidden: bool = False,
        embeddings: Sequence[tuple[int, torch.Tensor]] = (),
        shifts: np.ndarray | None = None,
    ) -> StepContext:
        """Grow the cache, move what goes to and from host memory, copy blocks, pack the batch. It is valid until the next one is prepared.

        Args:
            owner: tells whose a sequence id is; needed for a batch that a model will run on.
            hooks: functions of single sequences on activations.
            rows: packed rows whose logits `forward` returns.
            sampled: int64, on the device: what token ids below 0 in the plan stand for, -1 - i for entry i.
            hidden: `forward` leaves the hidden states of all rows in the context.
            embeddings: those of the plan's `media`, as (first packed row, [count, H]).
            shifts: see `media.position_shifts`.
        """
        hooks = hooks or SequenceHooks()
        with as_in_a_step(self.cache.device):  # what is made here outlives the call, whatever mode the caller is in
            self._order.follow(sampled)
            self.cache.ensure(plan.num_blocks)
            self.cache.states.ensure(plan.num_slots)
            if plan.moves is not None:
                self.cache.host.move(plan.moves)
            size = None if hidden else self._recording(plan, rows, hooks, shifts)
            inputs = self._inputs.prepare(plan, rows, sampled, size, shifts)
            if self.prefixes is not None and size is None:  # a recorded forward is the same whatever is shared
                self.prefixes.announce(plan, inputs.metadata)
            self.cache.copy_blocks(inputs.copies)
            context = StepContext(plan, inputs, self.cache, self.backend, owner, hooks)
        context.recording, context.num_rows, context.needs_hidden = size, len(rows), hidden
        context.embeddings = list(embeddings)
        if plan.adapters:
            with as_in_a_step(self.cache.device):
                adapters = self.model.adapters
                recorded = size is not None
                context.adapters = adapters.for_recorded(plan, rows, size) if recorded else adapters.for_forward(plan)
        return context

    def _recording(
        self, plan: StepPlan, rows: Sequence[int], hooks: SequenceHooks, shifts: np.ndarray | None
    ) -> int | None:
        """The number of sequences to pad a step to, if it is one that a recorded forward can run."""
        count = len(plan.seq_ids)
        decodes = plan.num_tokens == count and 0 < len(rows) <= count
        special = hooks.functions or plan.media or (shifts is not None and len(shifts) > 1)
        if self.graphs is None or not decodes or special or self.model.why_unrecordable is not None:
            return None
        if plan.adapters and self.model.adapters.why_unrecordable(plan) is not None:
            return None
        graphs, valid_for = self._graphs(plan)
        return graphs.size_for(count, valid_for)

    def forward(self, context: StepContext) -> torch.Tensor:
        """Run a prepared batch and return logits [R, V] of its `rows`, valid until the next forward."""
        if context.recording is None:
            return self.run(context, lambda context: self.model.forward(context, context.rows))
        return self.run(context, lambda context: self.model.whole(self._recorded(context)))

    def forward_apart(
        self,
        plan: StepPlan,
        groups: list[list[int]],
        owner: Callable[[int], Owner],
        hooks: SequenceHooks,
        *,
        rows: Sequence[int],
        sampled: torch.Tensor | None = None,
        hidden: bool = False,
        embeddings: Sequence[tuple[int, torch.Tensor]] = (),
        shifts: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`prepare` and `forward` where not all sequences may run together: those of each group do, one after another.

        Args:
            groups: places of the plan's sequences.

        Returns logits [R, V] and, if wanted, hidden states [T, H]: new tensors.
        """
        logits = states = None
        for index, places in enumerate(groups):
            part, packed = part_of(plan, places, with_copies=not index)
            where = {row: place for place, row in enumerate(packed)}
            mine = [place for place, row in enumerate(rows) if row in where]
            functions = {seq_id: hooks.functions[seq_id] for seq_id in part.seq_ids if seq_id in hooks.functions}
            context = self.prepare(
                part,
                owner,
                SequenceHooks(functions, hooks.errors),
                rows=[where[rows[place]] for place in mine],
                sampled=sampled,
                hidden=hidden,
                embeddings=[(where[row], values) for row, values in embeddings if row in where],
                shifts=None if shifts is None else shifts[:, packed],
            )
            result = self.forward(context)
            if logits is None:
                logits = result.new_empty(len(rows), result.shape[1])
            logits[to_device(mine, torch.int64, logits.device)] = result
            if hidden:
                if states is None:
                    states = context.hidden.new_empty(plan.num_tokens, context.hidden.shape[1])
                states[to_device(packed, torch.int64, states.device)] = context.hidden
        return logits, states

    def _recorded(self, context: StepContext, records: bool | None = None) -> torch.Tensor:
        """This rank's part of the logits [R, ...], valid until the next forward.

        Args:
            records: whether to record the forward, which all ranks of a sharded model do together; None: if it has to be.
        """
        size = context.recording

        def forward() -> torch.Tensor:
            # A context of its own, lest anything made for one forward be taken for a part of the other.
            inputs = self._inputs.static(size)
            fresh = StepContext(context.plan, inputs, self.cache, self.backend, context.owner, SequenceHooks())
            fresh.adapters = context.adapters
            return self.model.part(fresh, fresh.rows)

        graphs, valid_for = self._graphs(context.plan)
        lacks = graphs.lacks(size, valid_for)
        if lacks if records is None else records:
            logits = graphs.record(size, forward)
        else:
            logits = forward() if lacks else graphs.replay(size)
        return logits[: context.num_rows]

    def _graphs(self, plan: StepPlan) -> tuple[DecodeGraphs, tuple[int, ...]]:
        """(the recorded forwards for a plan, what they refer to as it is now)."""
        there = self.model.generation, self.cache.generation, self._inputs.generation
        if plan.adapters:
            return self.adapted_graphs, (*there, self.model.adapters.generation)
        return self.graphs, there

    @property
    def all_graphs(self) -> list[DecodeGraphs]:
        return [graphs for graphs in (self.graphs, self.adapted_graphs) if graphs is not None]

    def run(self, context: StepContext, execute: Callable[[StepContext], T]) -> T:
        """Call `execute` on a prepared batch the way a forward of a step runs."""
        with as_in_a_step(self.cache.device):
            return execute(context)

    def resize(self, num_blocks: list[int], moves: list[dict[int, int]]) -> None:
        """See `KVCache.resize`."""
        with as_in_a_step(self.cache.device):
            self._order.follow(None)
            self.cache.resize(num_blocks, moves)

    def beside(
        self, function: Callable[[KVCache], T], num_blocks: Sequence[int] = (), moves: TierMoves | None = None
    ) -> T:
        """Call `function` on the cache, after all steps so far: with so many blocks a group, and after these moves."""
        with as_in_a_step(self.cache.device):
            self._order.follow(None)
            self.cache.ensure(list(num_blocks))
            if moves is not None:
                self.cache.host.move(moves)
            return function(self.cache)

    def reserve(self, num_blocks: list[int], num_slots: int) -> None:
        """Take memory for so many blocks a group, and so many states, now."""
        with as_in_a_step(self.cache.device):
            self._order.follow(None)
            self.cache.ensure(num_blocks)
            self.cache.states.ensure(num_slots)

    def release(self) -> None:
        """Give the memory of the cache and of recorded forwards back; what was in it is lost. A step takes it again."""
        with as_in_a_step(self.cache.device):
            self._order.follow(None)
            for graphs in self.all_graphs:
                graphs.clear()
            self.cache.close()
