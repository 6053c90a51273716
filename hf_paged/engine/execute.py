"""From a plan to sampled tokens: forward, sampling, log-probabilities.

Nothing is committed, so a failure can be taken back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..core.plan import StepPlan
from ..core.request import Sequence
from ..core.scheduler import Scheduler
from ..runtime.batch import SequenceHooks
from ..runtime.packed import Owner
from ..runtime.runner import ModelRunner
from ..runtime.sampler import Sampler, SampleResult, SampleRow
from .metrics import StepClock
from .request_state import RequestState


@dataclass(slots=True)
class Due:
    """What one sequence samples in a step: its next token, and one more after each of its drafts.

    Attributes:
        first: index of its first row among the step's samples.
        drafts: the guesses that the rows after the first assume.
    """

    sequence: Sequence
    first: int
    drafts: list[int]

    @property
    def samples(self) -> range:
        return range(self.first, self.first + len(self.drafts) + 1)

    def rows(self) -> Iterator[SampleRow]:
        """The sampler's row for each of them: the sequence's own, and copies that end with the drafts so far."""
        state = self.sequence.request.state.sequence_state(self.sequence)
        yield state.row
        for count in range(1, len(self.drafts) + 1):
            yield state.row.extended(self.drafts[:count])

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


class StepExecutor:
    """Runs the plans of one scheduler on one model."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler):
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = Sampler(runner.cache.device, runner.backend)

    def execute(self, plan: StepPlan, hooks: SequenceHooks, clock: StepClock) -> tuple[list[Due], SampleResult | None]:
        """Who was due to sample, in the order of the plan's samples, and what came of it; None if nobody was."""
        mark = time.perf_counter()
        due = self._due(plan)
        sampled = list(dict.fromkeys(row for row, _ in plan.samples))
        prompt_rows = self._prompt_rows(plan)
        rows = sampled + [row for span, _ in prompt_rows for row in span]
        context = self._runner.prepare(plan, self._owner, hooks, rows=rows)
        mark = clock.lap("build", mark)
        logits = self._runner.forward(context)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        mark = clock.lap("model", mark)
        place = {row: index for index, row in enumerate(sampled)}
        selected = logits[: len(sampled)]
        if len(plan.samples) != len(sampled):  # n completions start from one row
            selected = selected[[place[row] for row, _ in plan.samples]]
        rows_to_sample = [row for one in due for row in one.rows()]
        result = self._sampler.sample(selected, rows_to_sample) if due else None
        offset = len(sampled)
        for span, state in prompt_rows:
            self._record_prompt(state, logits[offset : offset + len(span)])
            offset += len(span)
        clock.lap("sample", mark)
        return due, result

    def forget(self, state: RequestState) -> None:
        """The request has ended."""
        for sequence in state.sequences.values():
            self._sampler.forget(sequence.row)

    def _due(self, plan: StepPlan) -> list[Due]:
        due: list[Due] = []
        for index, (row, seq_id) in enumerate(plan.samples):
            if due and due[-1].sequence.seq_id == seq_id:
                due[-1].drafts.append(plan.token_ids[row])
            else:
                due.append(Due(self._scheduler.sequence(seq_id), index, []))
        return due

    def _owner(self, seq_id: int) -> Owner:
        sequence = self._scheduler.sequence(seq_id)
        request = sequence.request
        return Owner(request.request_id, sequence.index, request.state.hooks.row, sequence.num_prompt)

    def _prompt_rows(self, plan: StepPlan) -> list[tuple[range, RequestState]]:
        """Packed rows whose logits give log-probabilities of prompt tokens, per request that asked for them."""
        spans, start = [], 0
        for seq_id, new, context in zip(plan.seq_ids, plan.num_new, plan.num_context):
            sequence = self._scheduler.sequence(seq_id)
            state = sequence.request.state
            if state.params.prompt_logprobs is not None and sequence.index == 0:
                first = max(context, state.prompt_rows_done - 1)
                last = min(context + new, sequence.num_prompt - 1)
                if first < last:
                    spans.append((range(start + first - context, start + last - context), state))
            start += new
        return spans

    def _record_prompt(self, state: RequestState, logits: torch.Tensor) -> None:
        first = state.prompt_rows_done
        ids = state.request.prompt_token_ids[first : first + len(logits)]
        pending = self._sampler.prompt_logprobs(logits, ids, state.params.prompt_logprobs)
        state.record_prompt_logprobs(pending.result())
