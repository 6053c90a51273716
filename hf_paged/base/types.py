"""Results an engine hands out. Plain data: no torch, no transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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


@dataclass(slots=True)
class RequestOutput:
    """The state of one request after a step. `outputs` holds its `n` completions.

    Attributes:
        prompt: the prompt's text when it was given as text.
        prompt_logprobs: one entry per prompt token (the first is None) when asked for.
        error: the exception that ended the request, if one did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: Exception | None = None
