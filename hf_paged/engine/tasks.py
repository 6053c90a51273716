"""Tasks other than generating: what they need of each step's forward, and what comes of it.

A task's request runs like any other, in chunks, beside generating ones; it samples nothing and ends with its prompt. Every
chunk gives a piece, which is known by its positions: a request that is preempted computes some of them again.
"""

from __future__ import annotations

import numpy
import torch

from ..base.errors import InvalidArgument, UnsupportedOption
from ..base.tasks import (
    POOLINGS,
    ClassificationOutput,
    ClassifyParams,
    EmbeddingOutput,
    EmbedParams,
    ScoreOutput,
    ScoreParams,
)
from ..base.types import RequestOutput
from ..runtime.logprobs import logprob_table
from ..runtime.runner import PagedModel
from ..runtime.transfer import HostCopy, to_device

TaskParams = EmbedParams | ScoreParams | ClassifyParams


class Task:
    """One request's task while its prompt is computed.

    Attributes:
        needs_hidden: it needs rows of hidden states [t, H]; else of what the model's head makes of them [t, V].
        max_cached_tokens: most tokens that need not be computed; None: any.
    """

    needs_hidden = False
    max_cached_tokens: int | None = None

    def wanted(self, chunk: range) -> range:
        """Which of the positions in `chunk`, computed in this step, it needs the rows of: consecutive ones, or none."""
        raise NotImplementedError

    def reduce(self, rows: torch.Tensor, positions: range) -> HostCopy:
        """What is to be sent to the host of the rows of such positions."""
        raise NotImplementedError

    def take(self, positions: range, piece: numpy.ndarray) -> None:
        """A piece has come. Pieces of one computation come in order; it may begin anew."""
        raise NotImplementedError

    def result(self, output: RequestOutput) -> EmbeddingOutput | ScoreOutput | ClassificationOutput:
        """After the last piece. Raises FloatingPointError if numbers are no numbers."""
        raise NotImplementedError


class EmbedTask(Task):
    """The sum over the positions that are pooled."""

    needs_hidden = True

    def __init__(self, params: EmbedParams, pooling: str, num_tokens: int):
        self._params = params
        last = num_tokens - 1
        self._pooled = {"mean": range(num_tokens), "last": range(last, num_tokens), "cls": range(1)}[pooling]
        self.max_cached_tokens = self._pooled.start
        self._sum = numpy.zeros(())

    def wanted(self, chunk):
        return _common(chunk, self._pooled)

    def reduce(self, rows, positions):
        return HostCopy(rows.sum(0, dtype=torch.float64))

    def take(self, positions, piece):
        self._sum = piece if positions.start == self._pooled.start else self._sum + piece

    def result(self, output):
        vector = self._sum[: self._params.dimensions] / len(self._pooled)
        if not numpy.isfinite(vector).all():
            raise FloatingPointError("the hidden states contain NaN or inf")
        if self._params.normalize:
            vector = vector / max(numpy.linalg.norm(vector), 1e-12)
        return EmbeddingOutput(**_common_fields(output), embedding=vector.astype(numpy.float32))


class ScoreTask(Task):
    """Log-probabilities and ranks of the tokens after the first `num_prompt`."""

    def __init__(self, num_prompt: int, continuation: list[int]):
        self._first, self._continuation = num_prompt - 1, continuation
        self.max_cached_tokens = self._first
        self._lines: list[list[float]] = []  # of every token: its log-probability, its rank, and whether it is the argmax

    def wanted(self, chunk):
        return _common(chunk, range(self._first, self._first + len(self._continuation)))

    def reduce(self, rows, positions):
        start = positions.start - self._first
        tokens = self._continuation[start : start + len(positions)]
        tokens_t = to_device(tokens, torch.int64, rows.device)
        greedy_t = rows.argmax(-1) == tokens_t  # of logits that are equal only the first
        return HostCopy(torch.cat([logprob_table(rows, tokens_t, 0), greedy_t[:, None]], dim=1))

    def take(self, positions, piece):
        del self._lines[positions.start - self._first :]
        self._lines += piece.tolist()

    def result(self, output):
        logprobs, ranks, greedy = zip(*self._lines, strict=True)
        if numpy.isnan(logprobs).any():
            raise FloatingPointError("the logits contain NaN, or inf, which has no probability")
        return ScoreOutput(
            **_common_fields(output),
            token_ids=self._continuation,
            token_logprobs=list(logprobs),
            ranks=[int(rank) for rank in ranks],
            is_greedy=all(greedy),
        )


class ClassifyTask(Task):
    """The head's logits at the last position."""

    def __init__(self, activation: str, labels: list[str], num_tokens: int):
        self._activation, self._labels, self._last = activation, labels, num_tokens - 1
        self._logits = numpy.zeros(())

    def wanted(self, chunk):
        return _common(chunk, range(self._last, self._last + 1))

    def reduce(self, rows, positions):
        return HostCopy(rows[0].to(torch.float32, copy=True))

    def take(self, positions, piece):
        self._logits = piece

    def result(self, output):
        if not numpy.isfinite(self._logits).all():
            raise FloatingPointError("the logits contain NaN or inf")
        scores = activated(self._logits, self._activation)
        return ClassificationOutput(
            **_common_fields(output), logits=self._logits, scores=scores, label=self._labels[int(scores.argmax())]
        )


def activated(logits: numpy.ndarray, activation: str) -> numpy.ndarray:
    """float32 [C]."""
    values = logits.astype(numpy.float64)
    if activation == "softmax":
        values = numpy.exp(values - values.max())
        values /= values.sum()
    elif activation == "sigmoid":
        values = 0.5 * (1 + numpy.tanh(0.5 * values))  # the same, and no overflow
    return values.astype(numpy.float32)


class KeepTask(Task):
    """Nothing: the keys and values of the prompt are all that is wanted."""

    def wanted(self, chunk):
        return range(0)

    def result(self, output):
        return None


def make_task(params: TaskParams, token_ids: list[int], continuation: list[int] | None, model: PagedModel) -> Task:
    """The task of a request whose prompt has these tokens.

    Raises:
        UnsupportedOption: the checkpoint says how to pool hidden states, and that is not known here.
        InvalidArgument: more dimensions than its hidden states have.
    """
    if isinstance(params, EmbedParams):
        if (params.dimensions or 1) > model.hidden_size:
            raise InvalidArgument(f"dimensions must be at most {model.hidden_size}, got {params.dimensions}")
        pooling = params.pooling or model.pooling
        if pooling not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise UnsupportedOption(f"pooling: the checkpoint pools by {pooling!r}, which is not known; name one of {known}")
        return EmbedTask(params, pooling, len(token_ids))
    if isinstance(params, ScoreParams):
        return ScoreTask(len(token_ids), continuation)
    return ClassifyTask(params.activation or model.activation, model.labels, len(token_ids))


def check_head(params: object, model: PagedModel) -> None:
    """Raise UnsupportedOption if the model lacks what a request with these parameters needs."""
    if isinstance(params, EmbedParams):
        if model.hidden_size is None:
            raise UnsupportedOption(f"model: {model.name} gives logits only, so nothing can be embedded")
        return
    if isinstance(params, ClassifyParams):
        if not model.labels:
            raise UnsupportedOption(f"model: {model.name} has no head for classifying; load it with one to classify")
    elif not model.generates:
        what = "score continuations" if isinstance(params, ScoreParams) else "generate"
        raise UnsupportedOption(f"model: {model.name} has no language model head, so it cannot {what}")


def _common(first: range, second: range) -> range:
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


def _common_fields(output: RequestOutput) -> dict:
    return dict(request_id=output.request_id, prompt_token_ids=output.prompt_token_ids, metrics=output.metrics)
