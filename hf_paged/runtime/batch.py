"""From a StepPlan to tensors: the packed ragged batch every layer of one step shares."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hf_paged_kernels import autograd, ops
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.ref import elementwise

from ..core.plan import StepPlan
from .adapters import StepAdapters
from .inputs import StepInputs
from .kv_cache import KVCache
from .states import StepStates


@dataclass(slots=True)
class SequenceHooks:
    """Functions of single sequences on activations of a step.

    Attributes:
        functions: seq_id -> module name -> `f(activation [t, ...], positions [t]) -> replacement or None`.
        errors: seq_id -> what went wrong with it in the forward. The sequence has to end; the others are unharmed.
    """

    functions: dict[int, Mapping[str, Callable]] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)


class StepContext:
    """One step's packed batch, as the attention layers see it.

    Attributes:
        input_ids: [1, T] new tokens of all sequences, one after another.
        positions: [T] their places in their own sequences.
        position_ids: [1, T] the numbers the model is told: the positions, or a caller's own.
        rope_positions: [P, 1, T] what a model with M-RoPE is told instead, where images have moved them: the same in three
            planes, or one in each; None: it is told `position_ids`.
        rows: [R] packed rows whose logits whoever planned the step wants.
        num_rows: how many of `rows` they are; the others are padding.
        recording: the number of sequences the step is padded to, to run as a recorded forward; None: as it is.
        metadata: one AttentionMetadata per block group.
        states: the layers that keep a state run through it.
        shared: what one module of a forward computed for those that follow: merged projections, rotary tables.
        calls: how often each layer has attended in this forward.
        owner: sequence id -> whose it is (`packed.Owner`).
        logit_rows: [R] packed rows whose logits the running forward computes; None: all.
        packed: the batch as `current_batch` describes it, once somebody asked.
        hooks: activation hooks of single sequences, and how they fared.
        adapters: what changes the layers' outputs of single rows; None: nothing does.
        needs_hidden: whether somebody wants hidden states of this step.
        hidden: [T, H] those after the model's last norm, once the forward has run, if they are needed.
        backend: whose kernels run; see `ops`.
        embeddings: (first packed row, embeddings [count, H] of the rows from there on), where they are not the tokens' own.
        announce: called as `announce(context, rows, inputs_embeds)` when the model's forward begins: the other ranks of a
            sharded model are to begin, too. None: there are none.
        local_logits: whether the model's logits are to be those of this rank's part of the vocabulary.
    """

    __slots__ = (
        *("plan", "input_ids", "positions", "position_ids", "rows", "num_rows", "metadata", "states", "shared", "owner"),
        *("recording", "logit_rows", "packed", "hooks", "adapters", "needs_hidden", "hidden", "calls", "backend", "_layers"),
        *("announce", "local_logits", "embeddings", "rope_positions"),
    )

    def __init__(
        self,
        plan: StepPlan,
        inputs: StepInputs,
        cache: KVCache,
        backend: str,
        owner: Callable | None,
        hooks: SequenceHooks,
    ):
        self.plan = plan
        self._layers = cache.layers
        self.backend = backend
        self.shared: dict = {}
        self.owner = owner
        self.logit_rows: torch.Tensor | None = None
        self.packed = None
        self.hooks = hooks
        self.adapters: StepAdapters | None = None
        self.needs_hidden = False
        self.hidden: torch.Tensor | None = None
        self.input_ids = inputs.input_ids
        self.positions = inputs.positions
        self.position_ids = inputs.positions[None]
        self.rope_positions = None if inputs.rope_positions is None else inputs.rope_positions[:, None]
        self.rows = inputs.rows
        self.num_rows = len(inputs.rows)
        self.recording: int | None = None
        self.announce: Callable | None = None
        self.embeddings: list[tuple[int, torch.Tensor]] = []
        self.local_logits = False
        self.metadata = inputs.metadata
        self.states = StepStates(inputs.states, plan.num_tokens, cache.states) if plan.states else None

    def attend(self, layer_idx, query, key, value, *, scale, softcap=None, sinks=None, alibi_slopes=None):
        """Write this step's keys and values into the pages, then attend. Shapes [T, heads, dim]; see ops.attention_."""
        options = dict(scale=scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes)
        return self._attend(self._next(layer_idx), query, key, value, **options)

    def attend_rotary(
        self, layer_idx, query, key, value, cos, sin, *, scale, q_norm=None, k_norm=None, softcap=None, sinks=None
    ):
        """The same for queries and keys as their projections gave them: see ops.rotary_store for what they go through.

        cos, sin [T, R], or None where nothing is rotated.
        """
        layer = self._next(layer_idx)
        options = dict(scale=scale, softcap=softcap, sinks=sinks)
        norms = q_norm, k_norm
        if torch.is_grad_enabled():
            query, key = self._stored_keys(layer, query, key, value, cos, sin, norms)
            return self._attend(layer, query, key, value, stored=True, **options)
        query = self._store(layer, query, key, value, cos, sin, norms)
        return self._attend(layer, query, None, None, **options)

    def _store(self, layer, query, key, value, cos, sin, norms) -> torch.Tensor:
        return ops.rotary_store(
            query,
            key,
            value,
            layer.k_cache,
            layer.v_cache,
            self.metadata[layer.group].slot_mapping,
            cos,
            sin,
            q_norm=norms[0],
            k_norm=norms[1],
            **layer.scales,
            backend=self.backend,
        )

    def _stored_keys(self, layer, query, key, value, cos, sin, norms) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries, and the keys that are in the pages now, with their gradient."""

        def kernel(query, key, *weights):
            query = self._store(layer, query, key, value, cos, sin, _with(norms, weights))
            slots = self.metadata[layer.group].slot_mapping
            return query, ops.read_keys(layer.k_cache, slots, k_scale=layer.scales["k_scale"]).to(key.dtype)

        def formula(query, key, *weights):
            query, key = map(_normed, (query, key), _with(norms, weights))
            return (query, key) if cos is None else elementwise.rotary(query, key, cos, sin)

        return autograd.recomputed(kernel, formula, query, key, *(norm and norm.weight for norm in norms))

    def _attend(self, layer, query, key, value, *, stored: bool = False, sinks=None, **options):
        """`stored`: keys and values are in the pages, and here for their gradient only."""
        spec, metadata = layer.spec, self.metadata[layer.group]
        options |= dict(window=spec.window, chunk=spec.chunk)
        common = dict(options, backend=self.backend, **layer.scales)
        caches = layer.k_cache, layer.v_cache, metadata
        if not autograd.wanted(query, key, value, sinks):
            key, value = (None, None) if stored else (key, value)
            return ops.attention_(query, key, value, *caches, sinks=sinks, **common)

        def kernel(query, key, value, sinks):
            key, value = (None, None) if stored else (key, value)
            return ops.attention_(query, key, value, *caches, sinks=sinks, **common)

        block_size = layer.v_cache.shape[2]
        return autograd.attention(kernel, query, key, value, sinks, metadata, block_size=block_size, **options)

    def _next(self, layer_idx: int):
        """The pages of a layer's next attention in this forward."""
        layer = self._layers[layer_idx, self.calls[layer_idx]]
        self.calls[layer_idx] += 1
        return layer


def _with(norms: tuple[Norm | None, ...], weights: tuple[torch.Tensor | None, ...]) -> list[Norm | None]:
    return [norm and norm._replace(weight=weight) for norm, weight in zip(norms, weights)]


def _normed(heads: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return heads if norm is None else elementwise.rms_norm(heads, *norm[:2], offset=norm.offset, cast=norm.cast)


_active = threading.local()


def active_context():
    """The step (or probe) whose forward this thread is inside, or None."""
    return getattr(_active, "context", None)


@contextmanager
def activate(context):
    """Make `context` this thread's active one. Nesting is a bug: a step never runs inside a step."""
    assert active_context() is None, "a paged forward is already running in this thread"
    _active.context = context
    context.calls = Counter()
    try:
        yield context
    finally:
        _active.context = None
