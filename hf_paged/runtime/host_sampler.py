"""Sampling in torch: on the CPU all rows, on other devices those that the host has a hand in.

Which rows have which option, and on the CPU which rows need a second look, is decided on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from .draw import draw, rows_at_once, uniform
from .penalties import apply_rules, has_rules
from .sample_row import SampleResult, SampleRow
from .warpers import WIDTHS, WarpParams, narrow, row_argmax, warp_dense


def is_plain(row: SampleRow) -> bool:
    """Whether the row is an argmax of the raw logits and no more."""
    return row.params.temperature == 0.0 and not row.processors and not row.capture and not has_rules(row)


def sample_on_host(
    logits_RV: torch.Tensor, rows: Sequence[SampleRow], result: SampleResult
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64 [R], maxima [R]) of every row; what else is known already goes into `result`."""
    plain = [i for i, row in enumerate(rows) if is_plain(row)]
    if len(plain) == len(rows):
        return row_argmax(logits_RV)
    device = logits_RV.device
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
    peaks = torch.zeros(len(rows), dtype=torch.float32, device=device)
    if plain:
        index = torch.tensor(plain).to(device)
        found, peak = row_argmax(logits_RV[index])
        tokens[index], peaks[index] = found, peak.float()
    chosen = sorted(set(range(len(rows))).difference(plain))
    index = torch.tensor(chosen).to(device)
    x_SV = processed_logits(logits_RV, rows, chosen, result)
    tokens[index], peaks[index] = choose(x_SV, rows, chosen, result)
    return tokens, peaks


def processed_logits(
    logits_RV: torch.Tensor, rows: Sequence[SampleRow], chosen: list[int], result: SampleResult
) -> torch.Tensor:
    """fp32 [S, V]: the chosen rows' logits after their rules and processors. Errors go into `result`."""
    if len(chosen) == len(rows):
        x_SV = logits_RV.to(torch.float32, copy=True)
    else:
        x_SV = logits_RV[torch.tensor(chosen).to(logits_RV.device)].float()
    x_SV = x_SV.contiguous()
    subset = [rows[i] for i in chosen]
    for i in chosen:
        if rows[i].capture:
            result.raw_logits[i] = logits_RV[i].to(torch.float32, copy=True)
    errors: list[Exception | None] = [None] * len(subset)
    apply_rules(x_SV, subset, errors)
    _run_processors(x_SV, subset, errors)
    for place, i in enumerate(chosen):
        result.errors[i] = errors[place]
    return x_SV


def choose(
    x_SV: torch.Tensor, rows: Sequence[SampleRow], chosen: list[int], result: SampleResult
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [S], maxima [S]) of the chosen rows from their processed logits, which it may change."""
    tokens, peaks, processed = _choose(x_SV, [rows[i] for i in chosen])
    for place, i in enumerate(chosen):
        result.processed_logits[i] = processed[place]
    return tokens, peaks


def _run_processors(x_SV: torch.Tensor, rows: list[SampleRow], errors: list[Exception | None]) -> None:
    """Run each row's processors on a copy of it; what one raises stays in its row's entry of `errors`."""
    for place, row in enumerate(rows):
        if not row.processors or errors[place] is not None:
            continue
        try:
            logits_V, token_ids = x_SV[place].clone(), list(row.token_ids)
            for processor in row.processors:
                logits_V = _checked(processor, processor(token_ids, logits_V), x_SV)
            x_SV[place] = logits_V
        except Exception as error:
            errors[place] = error


def _checked(processor: Callable, logits_V, x_SV: torch.Tensor) -> torch.Tensor:
    name = getattr(processor, "__name__", type(processor).__name__)
    if not isinstance(logits_V, torch.Tensor):
        raise InvalidArgument(f"processors: {name} returned {type(logits_V).__name__}, not a tensor")
    if logits_V.shape != x_SV.shape[1:]:
        raise InvalidArgument(
            f"processors: {name} returned shape {tuple(logits_V.shape)}, expected {tuple(x_SV.shape[1:])}"
        )
    if not logits_V.is_floating_point():
        raise InvalidArgument(f"processors: {name} returned {logits_V.dtype}, not floats")
    return logits_V.to(x_SV)


def _choose(x_SV: torch.Tensor, rows: list[SampleRow]):
    """(tokens [S], maxima [S], processed logits or None per row) after rules and processors."""
    device, processed = x_SV.device, [None] * len(rows)
    greedy = [place for place, row in enumerate(rows) if row.greedy]
    sampled = [place for place, row in enumerate(rows) if not row.greedy]
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
    peaks = torch.zeros(len(rows), dtype=torch.float32, device=device)
    if greedy:
        index = torch.tensor(greedy).to(device)
        tokens[index], peaks[index] = row_argmax(x_SV[index] if sampled else x_SV)
        for place in greedy:
            processed[place] = x_SV[place].clone() if rows[place].capture else None
    if sampled:
        index = torch.tensor(sampled).to(device)
        drawn = _Draw(x_SV[index] if greedy else x_SV, [rows[place] for place in sampled])
        tokens[index], peaks[index] = drawn.run()
        for place, kept in zip(sampled, drawn.processed, strict=True):
            processed[place] = kept
    return tokens, peaks, processed


def _may_suffice(params: SamplingParams, width: int) -> bool:
    """Whether `width` candidates may be enough to find the tokens these options keep."""
    if params.top_k:
        return params.top_k < width
    return params.top_p < 1.0 or params.min_p > 0.0


class _Draw:
    """Warp and draw the sampled rows of one step. `x_SV` is its own, to be changed in place."""

    def __init__(self, x_SV: torch.Tensor, rows: list[SampleRow]):
        self.x_SV, self.rows = x_SV, rows
        self.params = [row.params for row in rows]
        self.processed: list[torch.Tensor | None] = [None] * len(rows)
        self.tokens = torch.zeros(len(rows), dtype=torch.int64, device=x_SV.device)
        self.warp = WarpParams(
            self._tensor([p.top_k for p in self.params], torch.int64),
            self._tensor([p.top_p for p in self.params], torch.float64),
            self._tensor([p.min_p for p in self.params], torch.float64),
        )
        self.uniforms = self._tensor(
            [uniform(row.seed, row.num_output) for row in rows], torch.float64
        )

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        x_SV = self.x_SV
        if any(p.temperature != 1.0 for p in self.params):
            x_SV.div_(self._tensor([p.temperature for p in self.params], torch.float32)[:, None])
        peaks = x_SV.amax(-1)
        unusable = ~peaks.isfinite()
        if x_SV.device.type != "cpu" or bool(unusable.any()):
            x_SV.masked_fill_(unusable[:, None], 0.0)  # their error is set later; until then they must not fault
        left = list(range(len(self.rows)))
        if x_SV.device.type == "cpu":  # elsewhere asking which rows are certain would wait for the device
            for width in WIDTHS:
                left = self._narrow(left, width)
        if left:
            self._dense(left)
        self._torch_draws()
        return self.tokens, peaks

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.x_SV.device)

    def _wants_processed(self, place: int) -> bool:
        return self.rows[place].capture or self.rows[place].use_torch_rng

    def _narrow(self, left: list[int], width: int) -> list[int]:
        """Try the rows that `width` candidates may suffice for. Returns the rows still to do."""
        if width >= self.x_SV.shape[1]:
            return left
        tried = [i for i in left if _may_suffice(self.params[i], width)]
        if not tried:
            return left
        x_TV = self.x_SV if len(tried) == len(self.rows) else self.x_SV[tried]
        found = narrow(x_TV, self.warp.rows(torch.tensor(tried)), width)
        sure = found.certain_R.tolist()
        done = [t for t, certain in enumerate(sure) if certain]
        if done:
            self._draw_candidates(found, done, tried)
        finished = {tried[t] for t in done}
        return [i for i in left if i not in finished]

    def _draw_candidates(self, found, done: list[int], tried: list[int]) -> None:
        """Draw in order of token id, as over the whole vocabulary, and rebuild full rows where they are wanted."""
        logits, ids = found.logits_RC[done], found.ids_RC[done]
        most = int((logits > -math.inf).sum(-1).max())  # kept tokens are the last columns
        ids, order = ids[:, -most:].sort(-1)
        logits = logits[:, -most:].gather(1, order)
        places = torch.tensor([tried[t] for t in done])
        column = draw(logits, self.uniforms[places], self.x_SV.shape[1])
        self.tokens[places] = ids.gather(1, column[:, None])[:, 0]
        for row, place in enumerate(places.tolist()):
            if self._wants_processed(place):
                kept = logits[row] > -math.inf
                full = torch.full_like(self.x_SV[place], -math.inf)
                full[ids[row][kept]] = logits[row][kept]
                self.processed[place] = full

    def _dense(self, left: list[int]) -> None:
        rows = rows_at_once(self.x_SV)
        for start in range(0, len(left), rows):
            self._dense_chunk(left[start : start + rows])

    def _dense_chunk(self, chunk: list[int]) -> None:
        index = self._tensor(chunk, torch.int64)
        x_LV = self.x_SV[index]
        warp_dense(x_LV, self.warp.rows(index), [self.params[i] for i in chunk])
        self.tokens[index] = draw(x_LV, self.uniforms[index], x_LV.shape[1])
        for row, place in enumerate(chunk):
            if self._wants_processed(place):
                self.processed[place] = x_LV[row].clone()

    def _torch_draws(self) -> None:
        """Rows that draw as transformers does, in the order of the batch."""
        for place, row in enumerate(self.rows):
            if row.use_torch_rng:
                probabilities = torch.softmax(self.processed[place][None], dim=-1)
                self.tokens[place] = torch.multinomial(probabilities, num_samples=1)[0, 0]
            if not row.capture:
                self.processed[place] = None
