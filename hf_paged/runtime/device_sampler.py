"""Sampling on the device, without waiting for it: rules, warpers and draws are kernels for all rows at once.

Rows that are `hosted` run through the host's code. Their processed logits join the others, unless the draw itself is the
host's (kept logits, torch's generator: transformers' own arithmetic).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from hf_paged_kernels import sampling

from .host_sampler import choose, processed_logits
from .pending import PendingSamples
from .rule_states import RuleStates
from .runner import on_device
from .sample_row import SampleResult, SampleRow
from .transfer import to_device

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DeviceSampler:
    """Args: backend: as in `hf_paged_kernels.sampling`."""

    def __init__(self, backend: str):
        self._backend = backend
        self._rules = RuleStates(backend)
        self._rows: list[weakref.ref[SampleRow]] = []  # of the latest step, whose options are on the device
        self._options: tuple[torch.Tensor, torch.Tensor] | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def idle(self) -> bool:
        """Whether the device keeps nothing of any sequence."""
        return self._rules.idle

    def forget(self, row: SampleRow) -> None:
        self._rules.forget(row)

    def sample(
        self, logits_RV: torch.Tensor, rows: Sequence[SampleRow], result: SampleResult, previous: PendingSamples | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [R], maxima fp32 [R]), both on the device; what else is known already goes into `result`."""
        # What is kept of sequences outlives the call, so none of it may be an inference tensor.
        with on_device(logits_RV.device), torch.inference_mode(False), torch.no_grad():
            self._follow(logits_RV.device)
            return self._sample(logits_RV, rows, result, previous)

    def _follow(self, device: torch.device) -> None:
        """On another stream than before: memory that is kept may be given away only when this one has read it."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream != self._stream:
            self._stream, self._rows = stream, []
            self._rules.record_stream(stream)

    def _sample(self, logits_RV, rows, result, previous) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_RV if logits_RV.dtype in _KERNEL_DTYPES else logits_RV.float()
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        hosted = [i for i, row in enumerate(rows) if row.hosted]
        scores = self._rules.apply(logits, rows, result.errors, previous)
        if not hosted:
            return self._draw(scores, rows)
        x_HV = processed_logits(logits_RV, rows, hosted, result)
        scores = scores.to(torch.float32, copy=True) if scores is logits else scores
        scores[to_device(hosted, torch.int64, scores.device)] = x_HV
        tokens, peaks = self._draw(scores, rows)
        places = [place for place, i in enumerate(hosted) if _drawn_by_host(rows[i])]
        if places:
            chosen = [hosted[place] for place in places]
            index = to_device(chosen, torch.int64, scores.device)
            x_CV = x_HV[to_device(places, torch.int64, scores.device)]
            tokens[index], peaks[index] = choose(x_CV, rows, chosen, result)
        return tokens, peaks

    def _draw(self, scores: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, torch.Tensor]:
        if all(row.greedy for row in rows):
            return sampling.argmax(scores, backend=self._backend)
        (temperature, top_p, min_p), (top_k, seeds) = self._options_of(rows, scores.device)
        positions = to_device([row.num_output for row in rows], torch.int64, scores.device)
        return sampling.sample(
            scores, temperature, top_k, top_p, min_p, seeds=seeds, positions=positions, backend=self._backend
        )

    def _options_of(self, rows: Sequence[SampleRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [3, R] and int64 [2, R]. They are sent again only when the rows change."""
        if len(rows) != len(self._rows) or not all(known() is row for known, row in zip(self._rows, rows)):
            params = [row.params for row in rows]
            # what the host draws counts as greedy here
            temperature = [0.0 if _drawn_by_host(row) else row.params.temperature for row in rows]
            reals = [temperature, [p.top_p for p in params], [p.min_p for p in params]]
            wholes = [[min(p.top_k, 2**62) for p in params], [_signed(row.seed) for row in rows]]
            self._options = to_device(reals, torch.float64, device), to_device(wholes, torch.int64, device)
            self._rows = list(map(weakref.ref, rows))
        return self._options


def _drawn_by_host(row: SampleRow) -> bool:
    return row.use_torch_rng or row.capture


def _signed(seed: int) -> int:
    """A seed's 64 bits as int64 holds them."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
