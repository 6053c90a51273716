"""What was sampled, while it is on its way from the device to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..base.types import Logprob
from .logprobs import logprob_entry
from .sample_row import SampleResult, SampleRow
from .transfer import HostCopy


class PendingSamples:
    """Sampled tokens on the device, on their way to the host.

    Attributes:
        tokens: int64 [R] on the device of the logits. Also of rows whose result will be an error some id of the
            vocabulary, so that the next step can be computed before anybody knows.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        host: HostCopy,
        rows: Sequence[SampleRow],
        groups: list[tuple[int, list[int]]],
        vocab_size: int,
        result: SampleResult,
    ):
        self.tokens = tokens
        self._host = host
        self._greedy = [row.greedy for row in rows]
        self._groups = groups
        self._vocab_size = vocab_size
        self._result = result

    def result(self) -> SampleResult:
        """The same as host values; waits for them."""
        host = self._host.tolist()
        self._read_tokens(host)
        self._read_logprobs(host)
        return self._result

    def token(self, row: int) -> int:
        """The token of one row if `result` has been called, else -1; also -1 where there is an error."""
        return self._result.tokens[row]

    def _read_tokens(self, host: list[float]) -> None:
        result, count = self._result, len(self._greedy)
        for i, greedy in enumerate(self._greedy):
            peak = host[count + i]
            if result.errors[i] is None and not (math.isfinite(peak) or (peak > 0 and greedy)):
                result.errors[i] = _unusable(peak)
            if result.errors[i] is None:
                result.tokens[i] = int(host[i])
            else:
                result.processed_logits[i] = None

    def _read_logprobs(self, host: list[float]) -> None:
        result, start = self._result, 2 * len(self._greedy)
        for num_top, wanted in self._groups:
            width = 2 + 2 * min(num_top, self._vocab_size)
            for i in wanted:
                if result.errors[i] is None:
                    result.logprobs[i] = logprob_entry(result.tokens[i], host[start : start + width])
                start += width


class PendingLogprobs:
    """Log-probabilities of given tokens, on their way to the host."""

    def __init__(self, token_ids: list[int], table: HostCopy):
        self._token_ids = token_ids
        self._table = table

    def result(self) -> list[dict[int, Logprob]]:
        """One entry per token; waits for them."""
        lines = self._table.tolist()
        return [logprob_entry(token, line) for token, line in zip(self._token_ids, lines, strict=True)]


def _unusable(peak: float) -> Exception:
    if math.isnan(peak):
        return FloatingPointError("the logits contain NaN")
    if peak > 0:
        return FloatingPointError("the logits contain inf, which has no probability")
    return ValueError("the logits are all -inf: masks and processors leave no token to choose")
