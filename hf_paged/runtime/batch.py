"""From a StepPlan to tensors: the packed ragged batch every layer of one step shares."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_paged_kernels import ops

from ..core.plan import StepPlan
from .kv_cache import KVCache
from .states import StepStates
from .transfer import to_device


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
        metadata: one AttentionMetadata per block group.
        states: the layers that keep a state run through it.
        projections: results of merged projections waiting for the sibling module that asks next.
        calls: how often each layer has attended in this forward.
        owner: sequence id -> whose it is (`packed.Owner`).
        logit_rows: [R] packed rows whose logits the running forward computes; None: all.
        packed: the batch as `current_batch` describes it, once somebody asked.
        hooks: activation hooks of single sequences, and how they fared.
    """

    __slots__ = (
        *("plan", "input_ids", "positions", "position_ids", "metadata", "states", "projections", "owner", "logit_rows"),
        *("packed", "hooks", "calls", "_layers", "_backend"),
    )

    def __init__(
        self,
        plan: StepPlan,
        cache: KVCache,
        backend: str,
        owner: Callable | None,
        hooks: SequenceHooks,
        sampled: torch.Tensor | None = None,
    ):
        self.plan = plan
        self._layers = cache.layers
        self._backend = backend
        self.projections: dict = {}
        self.owner = owner
        self.logit_rows: torch.Tensor | None = None
        self.packed = None
        self.hooks = hooks
        device, block_size = cache.device, cache.block_size

        num_new = np.asarray(plan.num_new, dtype=np.int64)
        context = np.asarray(plan.num_context, dtype=np.int64)
        cu_seqlens = np.zeros(len(num_new) + 1, dtype=np.int32)
        np.cumsum(num_new, out=cu_seqlens[1:])
        sequence = np.repeat(np.arange(len(num_new)), num_new)
        positions = np.arange(cu_seqlens[-1]) - cu_seqlens[sequence] + context[sequence]
        seq_lens = (context + num_new).astype(np.int32)

        self.input_ids = _input_ids(plan.token_ids, sampled, device)
        self.positions = torch.from_numpy(positions.astype(np.int64)).to(device)
        self.position_ids = self.positions[None]
        shared = dict(
            cu_seqlens_q=torch.from_numpy(cu_seqlens).to(device),
            seq_lens=torch.from_numpy(seq_lens).to(device),
            max_seqlen_q=int(num_new.max()),
            max_seqlen_k=int(seq_lens.max()),
        )
        self.metadata = [
            ops.AttentionMetadata(**shared, **_group_tables(tables, sequence, positions, block_size, device))
            for tables in plan.block_tables
        ]
        self.states = StepStates(plan, cache.states) if plan.states else None

    def attend(self, layer_idx, query, key, value, *, scale, softcap=None, sinks=None, alibi_slopes=None):
        """Write this step's keys and values into the pages, then attend. Shapes [T, heads, dim]; see ops.attention_."""
        layer = self._layers[layer_idx, self.calls[layer_idx]]
        self.calls[layer_idx] += 1
        return ops.attention_(
            query,
            key,
            value,
            layer.k_cache,
            layer.v_cache,
            self.metadata[layer.group],
            scale=scale,
            window=layer.spec.window,
            chunk=layer.spec.chunk,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            backend=self._backend,
        )


def _input_ids(token_ids: list[int], sampled: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """[1, T] the tokens; those below 0 stand for `sampled[-1 - token]`."""
    if sampled is None:
        return torch.tensor([token_ids], dtype=torch.int64, device=device)
    ids = np.array(token_ids, dtype=np.int64)
    places = np.flatnonzero(ids < 0)
    sources = -1 - ids[places]
    ids[places] = 0
    result = to_device(ids, torch.int64, device)
    result[to_device(places, torch.int64, device)] = sampled[to_device(sources, torch.int64, device)]
    return result[None]


def _group_tables(tables: list[list[int]], sequence, positions, block_size: int, device) -> dict:
    block_table = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
    for row, table in zip(block_table, tables):
        row[: len(table)] = table
    blocks = block_table[sequence, positions // block_size].astype(np.int64)
    slots = blocks * block_size + positions % block_size
    return dict(
        block_table=torch.from_numpy(block_table).to(device), slot_mapping=torch.from_numpy(slots).to(device)
    )


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
