"""Rules on logits on the device. What it has to know of a sequence stays there from step to step.

A sequence with rules on tokens has a slot: one int32 per token of the vocabulary, with flags and the number of times it
is in the output (`hf_paged_kernels.sampling.record`). Each step adds the tokens that are new, among them one that is
still on the device. The rules and their order are those of `penalties`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_paged_kernels import sampling

from ..base.errors import InvalidArgument
from .penalties import has_rules, outside
from .pending import PendingSamples
from .sample_row import SampleRow
from .transfer import to_device

_FIRST_SLOTS = 8


class _Planes:
    """Slots [N, V] of one dtype. Memory doubles when they run out, and is given back when none is in use."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self.tensor: torch.Tensor | None = None
        self._free: list[int] = []

    def take(self, vocab_size: int, device: torch.device) -> int:
        if not self._free:
            self._grow(vocab_size, device)
        slot = self._free.pop()
        self.tensor[slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        self._free.append(slot)
        if len(self._free) == len(self.tensor):  # kernels still to run keep their memory: the stream is in order
            self.tensor, self._free = None, []

    def _grow(self, vocab_size: int, device: torch.device) -> None:
        old = 0 if self.tensor is None else len(self.tensor)
        count = max(_FIRST_SLOTS, 2 * old)
        tensor = torch.empty(count, vocab_size, dtype=self._dtype, device=device)
        if old:
            tensor[:old] = self.tensor
        self.tensor = tensor
        self._free += range(count - 1, old - 1, -1)


@dataclass(slots=True)
class _Tracked:
    """What the device knows of one sequence.

    Attributes:
        slot, bias_slot: -1 where it needs none.
        length: tokens recorded, prompt and output, a pending one included.
        pending: if the last of them was pending, whose row it was: it is compared once the host knows it.
        error: why the sequence cannot be sampled.
    """

    slot: int = -1
    bias_slot: int = -1
    length: int = 0
    pending: tuple[PendingSamples, int] | None = None
    error: Exception | None = None


@dataclass(slots=True)
class _Marks:
    """Entries for `sampling.record`."""

    slots: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def add(self, slot: int, tokens, mark: int) -> None:
        before = len(self.tokens)
        self.tokens.extend(tokens)
        count = len(self.tokens) - before
        self.slots.extend([slot] * count)
        self.marks.extend([mark] * count)


class RuleStates:
    """Args: backend: as in `hf_paged_kernels.sampling`."""

    def __init__(self, backend: str):
        self._backend = backend
        self._states, self._bias = _Planes(torch.int32), _Planes(torch.float32)
        self._vocab_size = 0
        self._tracked: dict[int, _Tracked] = {}  # by id of the row, until it is forgotten or gone
        self._ends: dict[int, weakref.finalize] = {}
        self._gone: deque[int] = deque()  # rows nobody forgot: finalizers may run at any time, so they only leave word

    @property
    def idle(self) -> bool:
        """Whether no sequence has a slot, and no memory is held."""
        return self._states.tensor is None and self._bias.tensor is None

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """From now on the planes are used on this stream."""
        for planes in (self._states, self._bias):
            if planes.tensor is not None:
                planes.tensor.record_stream(stream)

    def forget(self, row: SampleRow) -> None:
        end = self._ends.get(id(row))
        if end is not None and end.detach() is not None:  # else it is that of a row that is gone, whose id this one has
            self._end(id(row))

    def apply(
        self,
        logits_RV: torch.Tensor,
        rows: Sequence[SampleRow],
        errors: list[Exception | None],
        previous: PendingSamples | None,
    ) -> torch.Tensor:
        """The logits themselves if no row has a rule to apply now, else fp32 [R, V] after all rules.

        Rows that are `hosted` are left to the host. Rows whose rules are wrong get an entry in `errors`.
        """
        self._sweep()
        ruled = [i for i, row in enumerate(rows) if not row.hosted and has_rules(row)]
        if not ruled:
            return logits_RV
        if logits_RV.shape[1] != self._vocab_size:  # the head was resized: begin anew
            self._gone.extend(key for key, end in list(self._ends.items()) if end.detach() is not None)
            self._sweep()
            self._vocab_size = logits_RV.shape[1]
        device, sampled = logits_RV.device, None if previous is None else previous.tokens
        marks, tracked = _Marks(), {}
        for i in ruled:
            one = self._track(rows[i].base or rows[i], device, marks, previous)
            if one.error is None:
                tracked[i] = one
            errors[i] = one.error
        if marks.tokens:
            columns = [to_device(c, torch.int64, device) for c in (marks.slots, marks.tokens, marks.marks)]
            sampling.record(self._states.tensor, *columns, sampled=sampled, backend=self._backend)
        scores = self._penalized(logits_RV, rows, tracked)
        forbidden = [(i, *entry) for i in tracked for entry in _forbidden_now(rows[i])]
        if forbidden:
            columns = to_device(list(zip(*forbidden)), torch.int64, device)
            sampling.forbid(scores, *columns, sampled=sampled, backend=self._backend)
        return scores

    def _penalized(self, logits_RV: torch.Tensor, rows: Sequence[SampleRow], tracked: dict[int, _Tracked]):
        device = logits_RV.device
        nothing = _Tracked()
        of_row = [tracked.get(i, nothing) for i in range(len(rows))]
        params = [row.params for row in rows]
        wholes = [
            [one.slot for one in of_row],
            [one.bias_slot for one in of_row],
            [int(p.allowed_token_ids is not None) for p in params],
            [int(row.num_output < row.params.min_tokens) for row in rows],
        ]
        reals = [
            [p.repetition_penalty for p in params],
            [p.presence_penalty for p in params],
            [p.frequency_penalty for p in params],
        ]
        slots, bias_slots, only_allowed, may_not_end = to_device(wholes, torch.int64, device)
        rules = sampling.Penalties(
            slots, bias_slots, *to_device(reals, torch.float64, device), only_allowed, may_not_end
        )
        states = self._states.tensor
        if states is None:
            states = torch.empty(0, self._vocab_size, dtype=torch.int32, device=device)
        guesses = [rows[i].guesses if i in tracked and rows[i].has_history_rules else () for i in range(len(rows))]
        drafts, most = None, max(map(len, guesses))
        if most:
            padded = [[*tokens, *[-1] * (most - len(tokens))] for tokens in guesses]
            drafts = to_device(padded, torch.int64, device)
        return sampling.penalize(
            logits_RV, states, rules, bias=self._bias.tensor, drafts=drafts, backend=self._backend
        )

    def _track(self, row: SampleRow, device: torch.device, marks: _Marks, previous) -> _Tracked:
        """What is known of a sequence, with `marks` for what is new."""
        one = self._tracked.get(id(row))
        if one is None:
            one = self._begin(row, device, marks)
        if one.slot >= 0 and row.has_history_rules:
            if not _follows(one, row, previous):
                self._states.tensor[one.slot].zero_()
                one.length, one.pending = 0, None
                self._mark_rules(one, row, marks)
            self._mark_tokens(one, row, marks, previous)
        return one

    def _begin(self, row: SampleRow, device: torch.device, marks: _Marks) -> _Tracked:
        vocab_size = self._vocab_size
        one = _Tracked(error=_wrong_rule(row, vocab_size))
        if one.error is None and _needs_slot(row):
            one.slot = self._states.take(vocab_size, device)
            self._mark_rules(one, row, marks)
        bias = row.params.logit_bias
        if one.error is None and bias:
            one.bias_slot = self._bias.take(vocab_size, device)
            ids = to_device(list(bias), torch.int64, device)
            self._bias.tensor[one.bias_slot].scatter_(0, ids, to_device(list(bias.values()), torch.float32, device))
        self._tracked[id(row)] = one
        end = weakref.finalize(row, self._gone.append, id(row))
        end.atexit = False
        self._ends[id(row)] = end
        return one

    def _sweep(self) -> None:
        while self._gone:
            self._end(self._gone.popleft())

    def _end(self, key: int) -> None:
        one = self._tracked.pop(key)
        del self._ends[key]
        if one.slot >= 0:
            self._states.give_back(one.slot)
        if one.bias_slot >= 0:
            self._bias.give_back(one.bias_slot)

    def _mark_rules(self, one: _Tracked, row: SampleRow, marks: _Marks) -> None:
        marks.add(one.slot, row.params.allowed_token_ids or (), sampling.ALLOWED)
        marks.add(one.slot, _single_bad_words(row), sampling.FORBIDDEN)
        marks.add(one.slot, _ending(row), sampling.ENDING)

    def _mark_tokens(self, one: _Tracked, row: SampleRow, marks: _Marks, previous: PendingSamples | None) -> None:
        token_ids, start = row.token_ids, one.length
        if start < row.num_prompt:
            marks.add(one.slot, token_ids[: row.num_prompt], sampling.IN_PROMPT)
            start = row.num_prompt
        marks.add(one.slot, token_ids[start:], sampling.OCCURRENCE)
        one.length = max(start, len(token_ids))
        if row.pending is not None and one.length == len(token_ids):
            marks.add(one.slot, [-1 - row.pending], sampling.OCCURRENCE)
            one.length += 1
            one.pending = previous, row.pending


def _follows(one: _Tracked, row: SampleRow, previous: PendingSamples | None) -> bool:
    """Whether what was recorded is the beginning of the sequence still: a step may have been taken back."""
    known = len(row.token_ids)
    if one.pending is None:
        return one.length <= known
    samples, place = one.pending
    if one.length == known + 1:
        return samples is previous and place == row.pending
    if one.length > known or samples.token(place) != row.token_ids[one.length - 1]:
        return False
    one.pending = None
    return True


def _needs_slot(row: SampleRow) -> bool:
    params = row.params
    return bool(
        row.has_history_rules
        or params.allowed_token_ids is not None
        or (params.min_tokens and _ending(row))
        or _single_bad_words(row)
    )


def _ending(row: SampleRow) -> list[int]:
    """What may not be sampled before the minimum length."""
    stops = row.params.stop_token_ids
    return [*stops] if row.params.ignore_eos else [*stops, *row.eos_token_ids]


def _single_bad_words(row: SampleRow) -> list[int]:
    """Bad words of one token. One that is only EOS never counts, as in transformers."""
    return [word[0] for word in row.bad_words_ids if len(word) == 1 and word[0] not in row.eos_token_ids]


def _forbidden_now(row: SampleRow) -> list[tuple[int, int, int]]:
    """(token, previous, trigger) of longer bad words: the token is forbidden if the previous token is the trigger.

    Where the host knows all tokens the trigger is -1, which is to say always; else the previous token is pending.
    """
    entries = []
    for word in row.bad_words_ids:
        seen = word[:-1] if row.pending is None else word[:-2]
        if len(word) > 1 and (not seen or list(row.token_ids[-len(seen) :]) == list(seen)):
            entries.append((word[-1], 0, -1) if row.pending is None else (word[-1], -1 - row.pending, word[-2]))
    return entries


def _wrong_rule(row: SampleRow, vocab_size: int) -> InvalidArgument | None:
    params = row.params
    last_tokens = [word[-1] for word in row.bad_words_ids]
    for name, tokens in (
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words", last_tokens),
    ):
        worst = max(tokens, default=0)
        if worst >= vocab_size:
            return outside(name, worst, vocab_size)
    return None
