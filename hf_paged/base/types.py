"""Results an engine hands out. Plain data: no torch, no transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .tasks import TaskOutput

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    `rank` is 1 for the most likely token; `decoded` is its text when the engine has a tokenizer.
    """

    logprob: float
    rank: int
    decoded: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the `time.monotonic` clock, and counts of tokens.

    `num_draft_tokens` were guessed by speculative decoding, of which `num_accepted_tokens` were right.
    """

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def copy(self) -> RequestMetrics:
        """As they are now. (`copy.copy` takes four times as long, for every token that is streamed.)"""
        return RequestMetrics(
            self.arrival,
            self.first_scheduled,
            self.first_token,
            self.finished,
            self.num_cached_tokens,
            self.num_preemptions,
            self.num_draft_tokens,
            self.num_accepted_tokens,
        )


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` completions.

    Attributes:
        index: 0 to n - 1.
        text: the whole text so far (empty without a tokenizer).
        token_ids: all tokens so far, a stop token included.
        logprobs: one {token id: Logprob} per token when `logprobs` was asked for.
        cumulative_logprob: sum of the chosen tokens' log-probabilities when `logprobs` was asked for.
        finish_reason: None while it runs; "stop" (EOS, stop token or string), "length", "abort" or "error".
        stop_reason: the stop token id or stop string that ended it; None for EOS and the rest.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class _WithOrigin:
    """What an engine remembers of the request of an output: no field of it, and lost where it is copied or pickled."""

    __slots__ = ("origin",)


@dataclass(slots=True)
class RequestOutput(_WithOrigin):
    """The state of one request after a step. `outputs` holds its `n` completions.

    Attributes:
        prompt: the prompt's text when it was given as text.
        prompt_logprobs: one entry per prompt token (the first is None) when asked for.
        result: what a finished request brings that was to embed, score or classify. Its only completion stays empty.
        error: the exception that ended the request, if one did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    result: TaskOutput | None = None
    error: Exception | None = None

    def __post_init__(self):
        self.origin = None

    def __getstate__(self):
        return None, {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}

    def __setstate__(self, state):
        self.origin = None
        for name, value in state[1].items():
            setattr(self, name, value)


@dataclass(slots=True)
class CompletionDelta:
    """What was added to one of a request's completions; fields as those of CompletionOutput."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def then(self, later: CompletionDelta) -> CompletionDelta:
        """Both together."""
        logprobs = None if later.logprobs is None else (self.logprobs or []) + later.logprobs
        return CompletionDelta(
            index=self.index,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=logprobs,
            finish_reason=later.finish_reason,
            stop_reason=later.stop_reason,
        )


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that an engine has loaded.

    Attributes:
        kind: PEFT's name for what it is, such as "LORA".
        source: the folder it came from, or the model whose adapter it is.
        rank: the highest of a LoRA adapter's; else None.
        num_bytes: memory it takes beside the model.
        apart: why its requests run in a forward of their own, on PEFT's modules; None if they run with all others.
    """

    name: str
    kind: str
    source: str
    rank: int | None
    num_bytes: int
    apart: str | None


@dataclass(slots=True)
class RequestDelta:
    """What was added to a request.

    Attributes:
        outputs: of the completions that have something new, in order.
        prompt_logprobs: of the whole prompt, with the last delta, when asked for.
        finished, result, error, metrics, prompt_token_ids: as those of RequestOutput, as of now.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionDelta]
    metrics: RequestMetrics
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    result: TaskOutput | None = None
    error: Exception | None = None

    def then(self, later: RequestDelta) -> RequestDelta:
        """Both together."""
        outputs = {delta.index: delta for delta in self.outputs}
        for delta in later.outputs:
            before = outputs.get(delta.index)
            outputs[delta.index] = delta if before is None else before.then(delta)
        return dataclasses.replace(later, outputs=[outputs[index] for index in sorted(outputs)])
