"""Rows on the engine's pages that somebody else drives: beams, candidates to verify, a draft model's guesses.

A `HeldRows` is a batch whose owner decides, step by step, which tokens each row computes next, which rows fork and what
is taken back. It runs on the engine's model and blocks, between the engine's own steps.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..base.errors import InvalidArgument, RequestTooLarge, UnsupportedOption
from ..core.media import longest_block, rest_of_block, whole_blocks
from ..core.request import MediaSpan, Sequence
from ..runtime.batch import StepContext
from ..runtime.layout import LayerSpec
from ..runtime.packed import Owner
from ..runtime.transfer import to_device

_numbers = itertools.count()
UNKNOWN = -1  # stands for a token that came as keys and values or as an embedding


@dataclass(frozen=True)
class Span:
    """Part of a row in one packed batch.

    Attributes:
        row: index of the row.
        start: of its tokens of this call, the first that this batch computes.
        count: how many it computes.
        offset: its first packed row.
    """

    row: int
    start: int
    count: int
    offset: int

    @property
    def packed(self) -> range:
        return range(self.offset, self.offset + self.count)


@dataclass(frozen=True)
class Chunk:
    """One packed batch of a call: which parts of which rows it held, and what `execute` returned for it."""

    spans: list[Span]
    result: Any


class HeldRows:
    """A batch of rows driven from outside; see `BatchEngine.hold`.

    Not for several threads at once, but other threads may use the engine meanwhile. `close` gives the blocks back; so
    does, at the engine's next step, the end of the object's life.

    Args:
        adapters: the name of every row's adapter; None: no row has one.
        media: the spans of images in every row, whose embeddings `execute` of `forward` puts into its context; None: none.
        publish: the rows' blocks may enter the prefix cache.
        expendable: whoever lacks blocks may empty rows between two calls.

    Attributes:
        keep_past: rows may be truncated, so sliding layers keep what they no longer see until `forget_past`.
        labels: what hooks are told as the number of each row; None: its index.
    """

    def __init__(self, engine, num_rows: int, *, name: str = "held", cache_salt: str | bytes | None = None,
                 adapters: list[str] | None = None, media: list[tuple[MediaSpan, ...]] | None = None,
                 publish: bool = True, expendable: bool = False):  # fmt: skip
        self._engine = engine
        self._held = engine._scheduler.held
        self._name = f"{name}-{next(_numbers)}"
        self.keep_past = False
        self._options = {"publish": publish, "expendable": expendable}
        self.labels: list[int] | None = None
        with engine._lock:
            engine._check_open()
            engine._release_dropped()
            engine._look_if_idle()
            numbers = map(engine.model.adapters.number, adapters or [None] * num_rows)
            self._sequences = [
                self._held.new(
                    f"{self._name}/{row}", cache_salt=cache_salt, adapter=number, media=spans, **self._options
                )
                for row, (number, spans) in enumerate(zip(numbers, media or [()] * num_rows, strict=True))
            ]
        self._drop = weakref.finalize(self, engine._dropped.append, self._sequences)
        self._drop.atexit = False

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of one packed batch."""
        return self._engine._scheduler.max_batch_tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row whose keys and values are in the cache."""
        return [sequence.num_computed for sequence in self._sequences]

    def token_ids(self, row: int) -> list[int]:
        return self._sequences[row].token_ids

    def sequence(self, row: int) -> Sequence:
        return self._sequences[row]

    def take_hit(self, row: int, token_ids: list[int]) -> int:
        """Start an empty row from the prefix cache; returns how many of `token_ids` that saves. One is always left."""
        with self._engine._lock:
            self._engine._begin_held()
            return self._held.take_hit(self._sequences[row], token_ids)

    def forward(
        self, new_tokens: list[list[int]], execute: Callable[[StepContext, list[Span]], Any] | None = None
    ) -> list[Chunk]:
        """Append tokens to rows and compute them, in packed batches of at most `max_batch_tokens`.

        Args:
            new_tokens: per row its next tokens; an empty list leaves the row alone.
            execute: called as `execute(context, spans)` to run the model on one packed batch; its results are returned.
                By default the model's logits [count of spans, V] of every span's last token.

        Raises:
            CacheFull: there are not enough blocks.
            RequestTooLarge: a row would exceed the engine's `max_model_len`.
            UnsupportedOption: a row goes on by several tokens, but its state can take up one only.
            InvalidArgument: a token id outside the vocabulary (ids below 0 stand for rows given as embeddings).
        """
        self._check(new_tokens)
        for sequence, tokens in zip(self._sequences, new_tokens):
            if not sequence.num_prompt:
                sequence.num_prompt = sequence.num_computed + len(tokens)
        execute = execute or self._last_logits
        chunks = []
        for work in self._chunks(new_tokens):
            with self._engine._lock:
                chunks.append(self._run(work, execute))
        return chunks

    def _check(self, new_tokens: list[list[int]]) -> None:
        if len(new_tokens) != len(self._sequences):
            raise InvalidArgument(f"new_tokens has {len(new_tokens)} rows, not {len(self._sequences)}")
        vocab_size, most = self._engine.model.vocab_size, self._engine.max_model_len
        for row, (sequence, tokens) in enumerate(zip(self._sequences, new_tokens)):
            if tokens and max(tokens) >= vocab_size:
                raise InvalidArgument(
                    f"input_ids has token id {max(tokens)} in row {row}, outside the vocabulary of {vocab_size}"
                )
            if sequence.num_computed + len(tokens) > most:
                raise RequestTooLarge(
                    f"row {row} would have {sequence.num_computed + len(tokens)} tokens, more than the {most} of this "
                    "engine's max_model_len"
                )
            if longest_block(sequence.request.media) > self.max_batch_tokens:
                raise RequestTooLarge(
                    f"row {row} has an image of {longest_block(sequence.request.media)} tokens, which are computed "
                    f"together, more than max_batch_tokens ({self.max_batch_tokens})"
                )
            if self._engine._scheduler.whole_prompts and sequence.num_computed and len(tokens) > 1:
                raise UnsupportedOption(
                    f"past_key_values: row {row} goes on by {len(tokens)} tokens, but this model's layers go on from a state "
                    "by one; give the whole prompt, without a cache"
                )

    def _chunks(self, new_tokens: list[list[int]]):
        """(row, start, tokens) lists of at most `max_batch_tokens` together, unless rows must not be cut, and of rows that
        may run in one forward."""
        groups: dict = {}
        for row, sequence in enumerate(self._sequences):
            groups.setdefault(self._engine.model.adapters.group(sequence.request.adapter), []).append(row)
        for rows in groups.values():
            yield from self._chunks_of(rows, new_tokens)

    def _chunks_of(self, rows: list[int], new_tokens: list[list[int]]):
        budget, whole = self.max_batch_tokens, self._engine._scheduler.whole_prompts
        work, room = [], budget
        for row in rows:
            tokens, media = new_tokens[row], self._sequences[row].request.media
            start, begin = 0, self._sequences[row].num_computed
            while start < len(tokens):
                together = rest_of_block(media, begin + start)
                if work and together > room:
                    yield work
                    work, room = [], budget
                count = whole_blocks(media, begin + start, min(room, len(tokens) - start))
                part = tokens if whole else tokens[start : start + count]
                work.append((row, start, part))
                start, room = start + len(part), room - len(part)
                if room < 1:
                    yield work
                    work, room = [], budget
        if work:
            yield work

    def _run(self, work: list[tuple[int, int, list[int]]], execute) -> Chunk:
        engine = self._engine
        engine._begin_held()
        plan, step = self._held.plan(
            [(self._sequences[row], part) for row, _, part in work], release_unseen=not self.keep_past
        )
        starts = {self._sequences[row].seq_id: (row, start) for row, start, _ in work}
        spans, offset = [], 0
        for seq_id, count in zip(plan.seq_ids, plan.num_new, strict=True):
            spans.append(Span(*starts[seq_id], count, offset))
            offset += count
        try:
            result = engine._execute_held(plan, lambda context: execute(context, spans), self._owner)
        except BaseException:
            self._held.rollback([self._sequences[row] for row, _, _ in work], step)
            raise
        self._held.commit(plan)
        return Chunk(spans, result)

    def _owner(self, seq_id: int) -> Owner:
        row = next(row for row, sequence in enumerate(self._sequences) if sequence.seq_id == seq_id)
        label = row if self.labels is None else self.labels[row]
        return Owner(f"{self._name}/{label}", 0, label, self._sequences[row].num_prompt)

    def _last_logits(self, context: StepContext, spans: list[Span]) -> torch.Tensor:
        last = [span.offset + span.count - 1 for span in spans]
        return self._engine.model.forward(context, to_device(last, torch.int64, context.input_ids.device))

    def load(self, lengths: list[int], source: Callable[[LayerSpec, int], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Fill empty rows with keys and values computed elsewhere.

        Args:
            lengths: tokens per row.
            source: `source(layer, row)` gives keys [n, Hkv, Dk] and values [n, Hkv, Dv] of the row's last n tokens;
                n is the length, or less where the layer does not look further back.
        """
        engine = self._engine
        work = [(row, 0, [UNKNOWN] * length) for row, length in enumerate(lengths) if length]
        self._check([[UNKNOWN] * length for length in lengths])
        with engine._lock:
            engine._begin_held()
            plan, step = self._held.plan([(self._sequences[row], part) for row, _, part in work], release_unseen=False)
            try:
                engine._runner.prepare(plan)
                for row, _, part in work:
                    tables = self._sequences[row].block_tables
                    for spec in engine.model.layers:
                        engine._cache.write(spec, tables, len(part), *source(spec, row))
            except BaseException:
                self._held.rollback([self._sequences[row] for row, _, _ in work], step)
                raise
            self._held.commit(plan)

    def read(self, layer: LayerSpec, row: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, Hkv, Dk] and values [n, Hkv, Dv] of the row's last n tokens, n being `most` or all there are."""
        sequence = self._sequences[row]
        with self._engine._lock:
            return self._engine._cache.read(layer, sequence.block_tables, sequence.num_computed, most)

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of a row.

        Raises InvalidArgument if the model keeps a state: it cannot be taken back.
        """
        if self._engine.has_state and num_tokens != self.lengths[row]:
            raise InvalidArgument(
                "rows cannot be truncated: this model's layers keep a state that cannot be taken back"
            )
        with self._engine._lock:
            self._held.truncate(self._sequences[row], num_tokens)

    def forget_past(self, rows: Iterable[int] | None = None) -> None:
        """Let sliding layers give back what no later query sees: nothing the rows (or all) hold now will be truncated."""
        with self._engine._lock:
            for row in range(len(self._sequences)) if rows is None else rows:
                self._held.release_unseen(self._sequences[row])

    def renew(self, row: int, *, cache_salt: str | bytes | None = None) -> None:
        """Start a row anew: empty, under a salt of its own."""
        with self._engine._lock:
            old = self._sequences[row]
            self._held.release(old)
            self._sequences[row] = self._held.new(old.request.request_id, cache_salt=cache_salt, **self._options)

    def reorder(self, sources: list[int]) -> None:
        """Row i continues what row `sources[i]` was: shared by reference, nothing is copied. The number may change."""
        with self._engine._lock:
            old, taken = list(self._sequences), set()
            rows = []
            for source in sources:
                rows.append(self._held.fork(old[source]) if source in taken else old[source])
                taken.add(source)
            self._sequences[:] = rows
            for row, sequence in enumerate(old):
                if row not in taken:
                    self._held.release(sequence)

    def close(self) -> None:
        """Give all blocks back. Closing twice is fine."""
        with self._engine._lock:
            for sequence in self._sequences:
                self._held.release(sequence)
            self._sequences.clear()
