"""From a plan to sampled tokens: forward, sampling, log-probabilities.

Nothing is committed, so a failure can be taken back. On CUDA nothing waits for the device until the result is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..core.plan import StepPlan
from ..core.request import Sequence
from ..core.scheduler import Scheduler
from ..runtime.adapters import groups_of
from ..runtime.batch import SequenceHooks
from ..runtime.media import EncoderOutputs, position_shifts
from ..runtime.packed import Owner
from ..runtime.pending import PendingSamples
from ..runtime.runner import ModelRunner, as_in_a_step, on_device
from ..runtime.sampler import Sampler, SampleResult, SampleRow, want_winners
from ..runtime.transfer import Milestone, to_device
from .metrics import StepClock
from .request_state import RequestState


@dataclass(slots=True)
class Due:
    """What one sequence samples in a step: its next token, and one more after each of its drafts.

    Attributes:
        first: index of its first row among the step's samples.
        pending: the place, among the samples of the step before, of the token it computes; None if that is known.
        drafts: the guesses that the rows after the first assume.
    """

    sequence: Sequence
    first: int
    pending: int | None
    drafts: list[int]

    @property
    def samples(self) -> range:
        return range(self.first, self.first + len(self.drafts) + 1)

    def rows(self) -> Iterator[SampleRow]:
        """The sampler's row for each of them: the sequence's own, and copies that end with the drafts so far."""
        row = self.sequence.request.state.sequence_state(self.sequence).row
        row.pending = self.pending
        yield row
        for count in range(1, len(self.drafts) + 1):
            yield row.extended(self.drafts[:count])

    def taken(self, result: SampleResult) -> tuple[list[int], Exception | None]:
        """(tokens the sequence gets, why no more): the sampled ones, as long as each is what the next row assumes."""
        tokens: list[int] = []
        for index, guess in zip(self.samples, [*self.drafts, None], strict=True):
            error = result.errors[index]
            if error is None:
                try:
                    tokens.append(self._chosen(result, index))
                except Exception as raised:
                    error = raised
            if error is not None:
                return tokens, error
            if tokens[-1] != guess:
                break
        return tokens, None

    def _chosen(self, result: SampleResult, index: int) -> int:
        state: RequestState = self.sequence.request.state
        if state.hooks.capture:
            captured = (result.raw_logits[index], result.processed_logits[index])
            state.sequence_state(self.sequence).captured.append(captured)
        token = result.tokens[index]
        return token if state.hooks.replace is None else state.hooks.replace(token)


@dataclass(slots=True)
class Part:
    """Something of a step that goes to one request.

    Attributes:
        receive: hands it over; waits for the device.
    """

    state: RequestState
    receive: Callable[[], None]


@dataclass(slots=True)
class Span:
    """Consecutive packed rows of which a request needs something beside its samples.

    Attributes:
        first: position of the first of them in its sequence.
    """

    state: RequestState
    first: int
    packed: range

    @property
    def positions(self) -> range:
        return range(self.first, self.first + len(self.packed))

    @property
    def needs_hidden(self) -> bool:
        """Whether it is hidden states that it needs; else what the head makes of them."""
        return self.state.task is not None and self.state.task.needs_hidden


@dataclass(slots=True, eq=False)
class InFlight:
    """A step that was launched. On CUDA the device may still be at it.

    Attributes:
        hooks: the functions of single sequences that ran in its forward, and how they fared.
        due: who samples, in the order of the plan's samples.
        samples: what they get; None if nobody is due.
        parts: what else of it goes to which request: log-probabilities of prompt tokens, pieces of tasks.
        done: when the device has done all of it.
    """

    plan: StepPlan
    hooks: SequenceHooks
    due: list[Due]
    samples: PendingSamples | None
    parts: list[Part]
    done: Milestone

    def result(self, clock: StepClock) -> SampleResult | None:
        """What was sampled; waits for the device. Raises what went wrong there."""
        mark = time.perf_counter()
        self.done.wait()
        mark = clock.lap("model", mark)
        result = None if self.samples is None else self.samples.result()
        for part in self.parts:
            if not part.state.finished:
                part.receive()
        clock.lap("sample", mark)
        return result


class StepExecutor:
    """Runs the plans of one scheduler on one model.

    Args:
        encoder: gives the embeddings of images; None for a model that takes none.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, encoder: EncoderOutputs | None = None):
        self._runner = runner
        self._scheduler = scheduler
        self._encoder = encoder
        self._sampler = Sampler(runner.cache.device, runner.backend)

    def launch(
        self, plan: StepPlan, hooks: SequenceHooks, previous: PendingSamples | None, clock: StepClock
    ) -> InFlight:
        """Start a step: encoder, forward, sampling, copies of the results to the host.

        Args:
            previous: what the step before sampled, if that is still in flight.

        Raises EncodingFailed, and what any of it raises.
        """
        with on_device(self._runner.cache.device):
            return self._launch(plan, hooks, previous, clock)

    def _launch(self, plan, hooks, previous, clock) -> InFlight:
        mark = time.perf_counter()
        due = self._due(plan)
        rows = list(dict.fromkeys(row for row, _ in plan.samples))
        place = {row: index for index, row in enumerate(rows)}
        sample_rows = [row for one in due for row in one.rows()]
        spans = self._spans(plan)
        of_head = [span for span in spans if not span.needs_hidden]
        of_hidden = [span for span in spans if span.needs_hidden]
        for span in of_head:
            rows += span.packed
        options = dict(rows=rows, sampled=None if previous is None else previous.tokens)
        if plan.media:
            options["embeddings"] = self._encode(plan)
            mark = clock.lap("encode", mark)
        if self._encoder is not None:
            media_of = lambda seq_id: self._scheduler.sequence(seq_id).request.state.media  # noqa: E731
            options["shifts"] = position_shifts(plan, media_of)
        parts, offset = [], len(place)
        if self._runner.finds_winners and due and not spans and want_winners(sample_rows):
            context = self._runner.prepare(plan, self._owner, hooks, **options)
            mark = clock.lap("build", mark)
            winners = self._runner.winners(context)
            mark = clock.lap("model", mark)
            samples = self._take_winners(winners, plan, place, sample_rows)
        else:
            logits, hidden, mark = self._forward(plan, hooks, options | {"hidden": bool(of_hidden)}, clock, mark)
            samples = self._sample(logits, plan, place, sample_rows, previous) if due else None
            for span in of_head:
                parts.append(self._part(span, logits[offset : offset + len(span.packed)]))
                offset += len(span.packed)
            parts += [self._part(span, hidden[span.packed.start : span.packed.stop]) for span in of_hidden]
        flight = InFlight(plan, hooks, due, samples, parts, Milestone(self._runner.cache.device))
        clock.lap("sample", mark)
        return flight

    def _forward(self, plan: StepPlan, hooks: SequenceHooks, options: dict, clock: StepClock, mark: float):
        """(logits of the rows, hidden states if they are wanted, the time): in one forward, or as many as adapters need."""
        groups = groups_of(self._runner.model.adapters, plan)
        if len(groups) > 1:
            logits, hidden = self._runner.forward_apart(plan, groups, self._owner, hooks, **options)
        else:
            context = self._runner.prepare(plan, self._owner, hooks, **options)
            mark = clock.lap("build", mark)
            logits = self._runner.forward(context)
            hidden = context.hidden
        return logits, hidden, clock.lap("model", mark)

    def _encode(self, plan: StepPlan) -> list[tuple[int, torch.Tensor]]:
        """The embeddings of the plan's media, by packed row."""
        if self._runner.model.hooked:  # somebody's hooks may make something else of an image each time
            self._encoder.clear()
        items = lambda rows: self._scheduler.sequence(rows.seq_id).request.state.media.items[rows.key]  # noqa: E731
        with as_in_a_step(self._runner.cache.device):
            return self._encoder.gather(plan.media, items)

    def forget(self, state: RequestState) -> None:
        """The request has ended."""
        for sequence in state.sequences.values():
            self._sampler.forget(sequence.row)

    def may_run_on(self, flight: InFlight) -> bool:
        """Whether the next step can be launched before this one's result is read: nobody needs to see it in between."""
        return not flight.hooks.functions and all(map(self._may_run_on, flight.due))

    def _may_run_on(self, one: Due) -> bool:
        state: RequestState = one.sequence.request.state
        sequence = state.sequence_state(one.sequence)
        if sequence.may_run_on is None:
            sequence.may_run_on = state.hooks.draftable and not self._sampler.reads_tokens(sequence.row)
        return sequence.may_run_on

    def _due(self, plan: StepPlan) -> list[Due]:
        due: list[Due] = []
        for index, (row, seq_id) in enumerate(plan.samples):
            token = plan.token_ids[row]
            if due and due[-1].sequence.seq_id == seq_id:
                due[-1].drafts.append(token)
            else:
                due.append(Due(self._scheduler.sequence(seq_id), index, -1 - token if token < 0 else None, []))
        return due

    def _owner(self, seq_id: int) -> Owner:
        sequence = self._scheduler.sequence(seq_id)
        request = sequence.request
        return Owner(request.request_id, sequence.index, request.state.hooks.row, sequence.num_prompt)

    def _sample(
        self,
        logits: torch.Tensor,
        plan: StepPlan,
        place: dict[int, int],
        sample_rows: list[SampleRow],
        previous: PendingSamples | None,
    ) -> PendingSamples:
        """Sample from `logits` [R, V], whose row of every packed row is its `place`."""
        return self._sampler.launch(_selected(logits, plan, place), sample_rows, previous)

    def _take_winners(
        self,
        winners: tuple[torch.Tensor, torch.Tensor],
        plan: StepPlan,
        place: dict[int, int],
        sample_rows: list[SampleRow],
    ) -> PendingSamples:
        """The same where the model found the largest logits itself."""
        tokens, peaks = (_selected(tensor, plan, place) for tensor in winners)
        return self._sampler.chosen(tokens, peaks, sample_rows, self._runner.model.vocab_size)

    def _spans(self, plan: StepPlan) -> list[Span]:
        """What requests need of this step beside samples: for log-probabilities of their prompts, or their tasks."""
        spans, start = [], 0
        for seq_id, new, context in zip(plan.seq_ids, plan.num_new, plan.num_context):
            sequence = self._scheduler.sequence(seq_id)
            state = sequence.request.state
            chunk = range(context, context + new)
            if state.task is not None:
                wanted = state.task.wanted(chunk)
            elif state.params.prompt_logprobs is not None and sequence.index == 0:
                wanted = range(max(context, state.prompt_rows_done - 1), min(context + new, sequence.num_prompt - 1))
            else:
                wanted = range(0)
            if wanted:
                first = start + wanted.start - context
                spans.append(Span(state, wanted.start, range(first, first + len(wanted))))
            start += new
        return spans

    def _part(self, span: Span, rows: torch.Tensor) -> Part:
        """What goes to a request, of its rows of logits or hidden states."""
        state, positions = span.state, span.positions
        if state.task is not None:
            piece = state.task.reduce(rows, positions)
            return Part(state, lambda: state.task.take(positions, piece.numpy()))
        token_ids = state.request.prompt_token_ids[positions.start + 1 : positions.stop + 1]
        pending = self._sampler.prompt_logprobs(rows, token_ids, state.params.prompt_logprobs)
        return Part(state, lambda: state.record_prompt_logprobs(pending.result()))


def _selected(rows: torch.Tensor, plan: StepPlan, place: dict[int, int]) -> torch.Tensor:
    """Of `rows` [R, ...] those of the plan's samples, where the row of a packed row is its `place`."""
    selected = rows[: len(place)]
    if len(plan.samples) != len(place):  # n completions start from one row
        index = to_device([place[row] for row, _ in plan.samples], torch.int64, rows.device)
        selected = selected[index]
    return selected
