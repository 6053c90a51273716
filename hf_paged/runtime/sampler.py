"""From logits to tokens, every row with its own options: rules, user processors, warpers, draw, log-probabilities.

Order, as in transformers: bias, allowed tokens, repetition, presence and frequency, bad words, minimum length, form, the
user's processors; then for sampled rows temperature, top-k, top-p, min-p. Rows never share arithmetic, so a row's
token and log-probabilities are bitwise the same in every batch. Rows whose processor raises, or whose logits cannot
be sampled, get an error; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged_kernels import ops

from .device_sampler import DeviceSampler
from .draw import derive_seed
from .host_sampler import is_plain, sample_on_host
from .logprobs import group_by_logprobs, logprob_table
from .pending import PendingLogprobs, PendingSamples
from .sample_row import SampleResult, SampleRow
from .transfer import HostCopy, to_device

__all__ = ["PendingSamples", "SampleResult", "SampleRow", "Sampler", "derive_seed", "want_winners"]


class Sampler:
    """Samples one token per row. On a GPU `launch` does not wait for the device, but for rows that are `hosted`.

    Args:
        device: where the logits will be.
        backend: whose kernels to use, as for attention. On CPU those of Triton are for tests of them.
    """

    def __init__(self, device: torch.device | str = "cpu", backend: str = "auto"):
        device = torch.device(device)
        backend = ops.resolve_backend(backend, device)
        on_device = device.type != "cpu" or backend == "triton"
        self._device_sampler = DeviceSampler(backend) if on_device else None

    def reads_tokens(self, row: SampleRow) -> bool:
        """Whether the host must know every token of the row before the next can be sampled, so that none may be pending."""
        if row.processors or row.constraint is not None:
            return True
        if self._device_sampler is not None and not row.hosted:
            return False
        return row.has_history_rules or any(len(word) > 1 for word in row.bad_words_ids)

    def sample(self, logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> SampleResult:
        """`launch`, and wait."""
        return self.launch(logits_RV, rows).result()

    @torch.no_grad()
    def launch(
        self, logits_RV: torch.Tensor, rows: Sequence[SampleRow], previous: PendingSamples | None = None
    ) -> PendingSamples:
        """Sample every row.

        Args:
            logits_RV: float tensor [R, V] of any dtype, not modified; R may be 0.
            rows: one per row of `logits_RV`. None of which `reads_tokens` is true may have a pending token.
            previous: what pending tokens are rows of.
        """
        assert logits_RV.dim() == 2 and len(logits_RV) == len(rows), "one SampleRow per row of logits"
        count, device = len(rows), logits_RV.device
        nothing: list = [None] * count
        result = SampleResult([-1] * count, nothing[:], nothing[:], nothing[:], nothing[:])
        if self._device_sampler is None:
            tokens, peaks = sample_on_host(logits_RV, rows, result)
        else:
            tokens, peaks = self._device_sampler.sample(logits_RV, rows, result, previous)
        groups = group_by_logprobs(rows)
        parts = [tokens.double(), peaks.double()]
        for num_top, wanted in groups:
            index = to_device(wanted, torch.int64, device)
            logits = logits_RV if len(wanted) == count else logits_RV[index]
            parts.append(logprob_table(logits, tokens[index], num_top).flatten())
        host = HostCopy(torch.cat(parts))  # one copy for everything
        return PendingSamples(tokens, host, rows, groups, logits_RV.shape[1], result)

    def chosen(self, tokens: torch.Tensor, peaks: torch.Tensor, rows: Sequence[SampleRow], vocab_size: int) -> PendingSamples:
        """What `launch` gives for rows that `want_winners`, whose largest logits `peaks` [R] are those of `tokens` [R]."""
        nothing: list = [None] * len(rows)
        result = SampleResult([-1] * len(rows), nothing[:], nothing[:], nothing[:], nothing[:])
        host = HostCopy(torch.cat([tokens.double(), peaks.double()]))
        return PendingSamples(tokens, host, rows, [], vocab_size, result)

    @torch.no_grad()
    def prompt_logprobs(
        self, logits_PV: torch.Tensor, next_token_ids: Sequence[int], num_top: int
    ) -> PendingLogprobs:
        """Log-probabilities of `next_token_ids[i]`, and of the `num_top` most likely tokens, from row i."""
        token_ids = list(next_token_ids)
        ids = to_device(token_ids, torch.int64, logits_PV.device)
        return PendingLogprobs(token_ids, HostCopy(logprob_table(logits_PV, ids, num_top)))

    def forget(self, row: SampleRow) -> None:
        """The sequence has ended: free what the device keeps of it."""
        if self._device_sampler is not None:
            self._device_sampler.forget(row)


def want_winners(rows: Sequence[SampleRow]) -> bool:
    """Whether all that these rows want of their logits is which is the largest."""
    return all(is_plain(row) and row.params.logprobs is None for row in rows)
