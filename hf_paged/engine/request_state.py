"""What the engine keeps of a request beside the scheduler's part: text, log-probabilities, hooks, the output object."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..base.branch import Branch
from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..base.types import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from ..core.request import Request, Sequence
from ..runtime.constraint import Constraint
from ..runtime.media import NO_MEDIA
from ..runtime.sampler import SampleRow, derive_seed
from .branching import kept_logprobs
from .tasks import Task
from .text import IncrementalDetokenizer, StopStringMatcher


@dataclass(frozen=True, kw_only=True)
class RowHooks:
    """User code that runs on one sequence, and what `generate` needs to see of it.

    Attributes:
        processors: called in order as `processor(token_ids, logits [V] fp32) -> logits [V]`.
        criteria: called after every token as `criterion(token_ids) -> bool`; true ends the sequence with "stop".
        replace: called as `replace(token) -> token` on every sampled token before it is appended.
        on_token: called with the appended token after the criteria have run.
        capture: keep the raw and the processed logits of every step in `SequenceState.captured`.
        torch_rng: draw from torch's default generator the way transformers does.
        forward_hooks: module name -> `f(activation [t, ...], positions [t]) -> replacement or None`.
        row: for rows of a batch, which one this is.
        constraint: the form of the output, where it is not that of the parameters.
    """

    processors: tuple[Callable, ...] = ()
    criteria: tuple[Callable, ...] = ()
    replace: Callable[[int], int] | None = None
    on_token: Callable[[int], None] | None = None
    capture: bool = False
    torch_rng: bool = False
    forward_hooks: Mapping[str, Callable] = field(default_factory=dict)
    row: int | None = None
    constraint: Constraint | None = None

    @property
    def draftable(self) -> bool:
        """Whether a step may sample several tokens at once: not if something must see every token before the next."""
        return not (self.processors or self.replace or self.capture or self.torch_rng or self.forward_hooks)


NO_HOOKS = RowHooks()


@dataclass(slots=True)
class SequenceState:
    """One completion: its sampling row, its growing text, and what was captured.

    `may_run_on`: whether its next token can be computed before anybody has seen the last one; None: not asked yet.
    """

    row: SampleRow
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    stop_matcher: StopStringMatcher | None
    captured: list[tuple] = field(default_factory=list)
    may_run_on: bool | None = None


class RequestState:
    """One request from `add` to its last output.

    Args:
        prompt_token_ids: those of the prompt as it was given, if there is more in the request's.
        task: what it wants instead of tokens.
        begun_logprobs: of the tokens that its outputs begin with (`Request.begun`), if it wants some.

    Attributes:
        media: the images in its prompt.
        streamed: what is put out is read bit by bit, and cannot be taken back.
    """

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        *,
        prompt: str | None,
        tokenizer,
        seed: int | None,
        hooks: RowHooks,
        prompt_token_ids: list[int] | None = None,
        bad_words_ids: Iterable[list[int]] = (),
        constraint: Constraint | None = None,
        task: Task | None = None,
        begun_logprobs: list[dict[int, Logprob]] | None = None,
    ):
        self.request = request
        self.params = params
        self.hooks = hooks
        self.callback: Callable[[RequestOutput], None] | None = None
        self.task = task
        self.media = NO_MEDIA
        self.streamed = False
        self.begun_logprobs = begun_logprobs
        self.seed = seed
        self.bad_words_ids = list(bad_words_ids)
        self.constraint = constraint
        self.tokenizer = tokenizer
        self.sequences: dict[int, SequenceState] = {}
        self.prompt_rows_done = 1  # the first prompt token has no log-probability
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=request.prompt_token_ids if prompt_token_ids is None else prompt_token_ids,
            outputs=[],
            metrics=RequestMetrics(arrival=request.arrival),
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
        )

    def sequence_state(self, sequence: Sequence) -> SequenceState:
        """The state of one of the request's sequences, made when the sequence first appears."""
        state = self.sequences.get(sequence.seq_id)
        if state is None:
            state = self._begin(sequence, self.request.begun, self.begun_logprobs)
        return state

    def restart(self, sequence: Sequence, kept: Branch) -> None:
        """Its output is what `kept` says, and no more. The CompletionOutput is a new one: the old may be read by somebody."""
        old = self.sequences.get(sequence.seq_id)
        if old is not None:
            self.output.outputs.remove(old.output)
            self._begin(sequence, kept.output_token_ids, kept_logprobs(kept, self.params.logprobs))

    def take_over(self, again: RequestState) -> None:
        """How it is sampled from now on: as `again`, a request with the same prompt. Its sequences are to be restarted."""
        for name in ("max_tokens", "min_tokens", "stop_token_ids", "eos_token_ids", "params"):
            setattr(self.request, name, getattr(again.request, name))
        for name in ("params", "seed", "bad_words_ids", "constraint", "begun_logprobs"):
            setattr(self, name, getattr(again, name))

    def check_begun(self) -> None:
        """Raise InvalidArgument if the tokens that its outputs begin with would have ended them."""
        request, state = self.request, self._new_sequence(Sequence(0, self.request, 0, (0, 0), 0), 0)
        for count, token in enumerate(request.begun, 1):
            if count >= request.min_tokens and token in request.eos_token_ids | request.stop_token_ids:
                raise InvalidArgument(f"position: token {token}, output token {count} of those that stay, ends the output")
        stop = self._replay(state, request.begun, None)
        if stop is not None:
            raise InvalidArgument(f"position: the output tokens that stay have the stop string {stop!r}, which ends the output")

    def _begin(
        self, sequence: Sequence, tokens: Iterable[int], logprobs: list[dict[int, Logprob]] | None
    ) -> SequenceState:
        """A new state of `sequence`, with the output tokens that are known already."""
        state = self._new_sequence(sequence, derive_seed(self.seed, sequence.index))
        self._replay(state, tokens, logprobs)
        self.sequences[sequence.seq_id] = state
        self.output.outputs.append(state.output)
        self.output.outputs.sort(key=lambda completion: completion.index)
        return state

    def _replay(
        self, state: SequenceState, tokens: Iterable[int], logprobs: list[dict[int, Logprob]] | None
    ) -> str | None:
        """Output tokens of a new completion that are known before it begins. Returns the first stop string in them."""
        output, matched = state.output, None
        for token in tokens:
            output.token_ids.append(token)
            if state.detokenizer is not None and matched is None:
                matched = self._show(state, state.detokenizer.append(token))
        if logprobs is not None:
            output.logprobs = list(logprobs)
            for token, entry in zip(output.token_ids, logprobs, strict=True):
                output.cumulative_logprob += entry[token].logprob
        return matched

    def _new_sequence(self, sequence: Sequence, seed: int) -> SequenceState:
        params, request = self.params, self.request
        row = SampleRow(
            params=params,
            token_ids=sequence.token_ids,
            num_prompt=sequence.num_prompt,
            seed=seed,
            eos_token_ids=request.eos_token_ids,
            bad_words_ids=self.bad_words_ids,
            constraint=None if self.constraint is None else self.constraint.fork(),
            processors=self.hooks.processors,
            use_torch_rng=self.hooks.torch_rng,
            capture=self.hooks.capture,
        )
        detokenizer = matcher = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                keep_special_token_ids=params.keep_special_token_ids,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            if params.stop:
                matcher = StopStringMatcher(params.stop, params.include_stop_str_in_output)
        wants_logprobs = params.logprobs is not None
        output = CompletionOutput(
            index=sequence.index,
            logprobs=[] if wants_logprobs else None,
            cumulative_logprob=0.0 if wants_logprobs else None,
        )
        return SequenceState(row, output, detokenizer, matcher)

    def record_token(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None) -> str | None:
        """Append a sampled token to its completion. Returns the stop string that ends it, or None."""
        state = self.sequence_state(sequence)
        output, metrics = state.output, self.output.metrics
        output.token_ids.append(token)
        if metrics.first_token is None:
            metrics.first_token = time.monotonic()
        if logprobs is not None and output.logprobs is not None:
            self._name_tokens(logprobs)
            output.logprobs.append(logprobs)
            output.cumulative_logprob += logprobs[token].logprob
        if state.detokenizer is None:
            return None
        return self._extend_text(state, sequence, token)

    def _extend_text(self, state: SequenceState, sequence: Sequence, token: int) -> str | None:
        """Add the token's text. The token that ends a completion (EOS, a stop token) shows only when asked for."""
        is_last = len(state.output.token_ids) == sequence.num_output
        ended_by_token = is_last and sequence.finish_reason == "stop"
        piece = ""
        if not ended_by_token or self.params.include_stop_str_in_output:
            piece = state.detokenizer.append(token)
        return self._show(state, piece)

    def _show(self, state: SequenceState, piece: str) -> str | None:
        """Add decoded text to the completion's, up to a stop string. Returns the stop string once there is one."""
        if state.stop_matcher is None:
            state.output.text += piece
            return None
        early = len(state.output.token_ids) <= self.params.min_tokens
        state.output.text, matched = state.stop_matcher.feed(piece, search=not early)
        return matched

    def _close_text(self, state: SequenceState) -> None:
        """However a completion ends, what was held back (half a character, half a stop string) is text now."""
        if state.detokenizer is None:
            return
        if self._show(state, state.detokenizer.flush()) is None and state.stop_matcher is not None:
            state.output.text = state.stop_matcher.flush()

    def record_prompt_logprobs(self, entries: list[dict[int, Logprob]]) -> None:
        for entry in entries:
            self._name_tokens(entry)
        self.output.prompt_logprobs += entries
        self.prompt_rows_done += len(entries)

    def _name_tokens(self, logprobs: dict[int, Logprob]) -> None:
        if self.tokenizer is not None:
            for token, entry in logprobs.items():
                entry.decoded = self.tokenizer.decode([token])

    def finish_sequence(self, sequence: Sequence) -> None:
        """Copy the scheduler's verdict on a finished sequence into its completion.

        Raises what a task finds wrong with what has come of it; nothing is changed then.
        """
        state = self.sequence_state(sequence)
        if self.task is not None:
            self.output.result = self.task.result(self.output)
        self._close_text(state)
        state.output.finish_reason = sequence.finish_reason
        state.output.stop_reason = sequence.stop_reason

    def end(self, reason: str, error: Exception | None) -> None:
        """End every completion that still runs ("abort" or "error")."""
        if not self.output.outputs:  # it never got as far as a sequence of its own
            self.output.outputs.append(CompletionOutput(index=0))
        for state in self.sequences.values():
            if not state.output.finished:
                self._close_text(state)
        for output in self.output.outputs:
            if output.finish_reason is None:
                output.finish_reason = reason
        self.output.error = error
        self.output.finished = True

    def settle(self) -> None:
        """After a step: note times, and whether the request is finished."""
        metrics, request = self.output.metrics, self.request
        metrics.first_scheduled = request.first_scheduled
        metrics.num_preemptions = sum(sequence.num_preemptions for sequence in request.sequences)
        metrics.num_cached_tokens = request.sequences[0].num_cached_tokens if request.sequences else 0
        metrics.num_draft_tokens = sum(sequence.num_draft_tokens for sequence in request.sequences)
        metrics.num_accepted_tokens = sum(sequence.num_accepted_tokens for sequence in request.sequences)
        outputs = self.output.outputs
        if len(outputs) == self.params.n and all(output.finished for output in outputs):
            self.output.finished = True
        if self.output.finished and metrics.finished is None:
            metrics.finished = time.monotonic()
            if self.media.spans and self.output.origin is not None:
                self.output.origin = replace(self.output.origin, media=None)

    def notify(self) -> None:
        """Tell the caller's callback. A callback that raises ends with a warning: nobody else may suffer from it."""
        try:
            self.callback(self.output)
        except Exception as error:
            warnings.warn(f"on_output of {self.request.request_id} raised {error!r}; it is not called again", stacklevel=2)
            self.callback = None

    @property
    def finished(self) -> bool:
        return self.output.finished

    @property
    def num_output(self) -> int:
        return sum(len(output.token_ids) for output in self.output.outputs)

    def captured(self) -> list[tuple]:
        """(raw logits [V], processed logits [V]) of every step so far of the only completion."""
        return next(iter(self.sequences.values())).captured if self.sequences else []

    def raise_error(self) -> None:
        """Raise the request's own error, if it ended with one."""
        if self.output.error is not None:
            raise self.output.error


_numbers = itertools.count()


def new_request_id() -> str:
    return f"request-{next(_numbers)}"


