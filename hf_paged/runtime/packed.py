"""Which rows of a step's packed batch belong to which request: what a forward hook may ask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..base.errors import InvalidArgument
from .batch import StepContext, active_context


class Owner(NamedTuple):
    """Whose a sequence of a step is; see `Segment`."""

    request_id: str
    index: int
    row: int | None
    num_prompt: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a packed batch: the tokens that one sequence computes in this step.

    Attributes:
        request_id: of the request it belongs to. Rows of one `model.generate` are named alike, up to "/" and the row.
        index: which of the request's `n` completions; 0 while its prompt is computed for all of them.
        row: for rows of `model.generate`, the row of its batch (of `input_ids` as decoding sees them: with
            `num_return_sequences` or beams every prompt stands there several times); None for requests of an engine.
        rows: the packed rows: in activations [1, T, H] they are `activation[0, segment.rows]`.
        positions: the positions of these tokens in their own sequence.
        token_ids: the tokens.
        is_prefill: whether they are tokens of the prompt. (The last of them gives the first output token.)
    """

    request_id: str
    index: int
    row: int | None
    rows: slice
    positions: range
    token_ids: list[int]
    is_prefill: bool


class PackedBatch:
    """The packed batch of the step whose forward is running. It stays valid after the step.

    Attributes:
        segments: one per sequence, in the order of their rows; together they cover all T rows.
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], the position of every token in its own sequence.
        logit_rows: int64 [R], the packed rows that the output embedding sees, in its order: those whose logits are
            needed. None if it sees all T.
    """

    def __init__(self, context: StepContext):
        plan = context.plan
        # Copies: those of the context may be the next step's soon.
        self.input_ids = context.input_ids.clone()
        self.position_ids = context.position_ids.clone()
        self.logit_rows = None if context.logit_rows is None else context.logit_rows.clone()
        self.segments: list[Segment] = []
        token_ids, start = plan.token_ids, 0
        if token_ids and min(token_ids) < 0:  # some were still on the device when the step was planned
            token_ids = context.input_ids[0].tolist()
        for seq_id, count, first in zip(plan.seq_ids, plan.num_new, plan.num_context):
            owner = context.owner(seq_id)
            rows = slice(start, start + count)
            self.segments.append(
                Segment(
                    owner.request_id,
                    owner.index,
                    owner.row,
                    rows,
                    range(first, first + count),
                    token_ids[rows],
                    first < owner.num_prompt,
                )
            )
            start += count
        self.num_tokens = start

    def __repr__(self) -> str:
        return f"PackedBatch({self.num_tokens} tokens of {len(self.segments)} sequences)"

    @cached_property
    def segment_ids(self) -> torch.Tensor:
        """int64 [T] on the batch's device: the place in `segments` of the sequence every row belongs to."""
        counts = torch.tensor([len(segment.positions) for segment in self.segments])
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.input_ids.device)

    def segments_of(self, request_id: str) -> list[Segment]:
        """The segments of one request: none if it is not in this step, several if it has several completions."""
        return [segment for segment in self.segments if segment.request_id == request_id]


def current_batch() -> PackedBatch | None:
    """The packed batch of the step whose forward this thread is inside; None anywhere else.

    For forward hooks on modules of a patched model, which see the tokens of all requests of a step as one batch
    [1, T, H]. In the model's ordinary forward, and in callbacks that run between forwards (logits processors, stopping
    criteria), there is none. Layers that keep a state (state spaces, linear attention, convolutions) run their own code
    on groups of sequences: hook such a layer as a whole.

        def hook(module, args, output):
            batch = hf_paged.current_batch()
            if batch is not None:
                for segment in batch.segments:
                    record(segment.request_id, segment.positions, output[0, segment.rows])
    """
    context = active_context()
    if not isinstance(context, StepContext) or context.owner is None:  # somebody looks at the model, nobody uses it
        return None
    if context.states is not None and context.states.running is not None:
        raise InvalidArgument(
            f"current_batch was called inside {context.states.running}, which does not run on the packed batch; "
            "hook that module itself"
        )
    if context.packed is None:
        context.packed = PackedBatch(context)
    return context.packed
