"""From logits to tokens, every row with its own options: rules, user processors, warpers, draw, log-probabilities.

Order, as in transformers: bias, allowed tokens, repetition, presence and frequency, bad words, minimum length, the
user's processors; then for sampled rows temperature, top-k, top-p, min-p. Rows never share arithmetic, so a row's
token and log-probabilities are bitwise the same in every batch. Rows whose processor raises, or whose logits cannot
be sampled, get an error; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..base.types import Logprob
from .draw import derive_seed, draw, rows_at_once, uniform
from .penalties import apply_rules, has_rules
from .transfer import HostCopy, to_device
from .warpers import WIDTHS, WarpParams, narrow, row_argmax, row_topk, warp_dense

__all__ = ["PendingSamples", "SampleResult", "SampleRow", "Sampler", "derive_seed"]


@dataclass(slots=True)
class SampleRow:
    """One row to sample. It may live as long as its sequence: `token_ids` is read anew at every step.

    Attributes:
        token_ids: prompt and output so far, without padding.
        num_prompt: how many of them are the prompt.
        seed: 64-bit; with the number of output tokens it fixes the draw.
        pending: if one more output token follows that the host does not know yet, the row of the step before that
            sampled it; else None.
        eos_token_ids: forbidden, with the stop tokens, until `min_tokens` (unless `ignore_eos`).
        bad_words_ids: token sequences of `bad_words`.
        processors: `(token_ids: list[int], logits [V] fp32) -> logits [V]`, called in order on a copy of the row.
        use_torch_rng: draw with `torch.multinomial` on probabilities [1, V] from torch's default generator.
        capture: keep raw and processed logits.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_ids: list[list[int]] = field(default_factory=list)
    processors: tuple[Callable, ...] = ()
    use_torch_rng: bool = False
    capture: bool = False
    pending: int | None = None

    @property
    def num_output(self) -> int:
        """Output tokens so far, a pending one included."""
        return len(self.token_ids) - self.num_prompt + (self.pending is not None)

    @property
    def reads_tokens(self) -> bool:
        """Whether the host must know every token before it can sample the next one."""
        params = self.params
        return bool(
            self.processors
            or params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or any(len(word) > 1 for word in self.bad_words_ids)
        )

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0.0

    def extended(self, token_ids: Sequence[int]) -> SampleRow:
        """The row as it would be with `token_ids` appended to the output."""
        return replace(self, token_ids=[*self.token_ids, *token_ids])


@dataclass(slots=True)
class SampleResult:
    """One entry per row in every list.

    Attributes:
        tokens: the token, or -1 where the row has an error.
        logprobs: from the raw logits (before rules and warpers), chosen token first; None where not asked for.
        errors: why a row has no token.
        raw_logits, processed_logits: fp32 [V] copies of rows with `capture`; greedy rows are processed without warpers.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]
    errors: list[Exception | None]
    raw_logits: list[torch.Tensor | None]
    processed_logits: list[torch.Tensor | None]


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

    def wait(self) -> None:
        """Return when the device has sampled them."""
        self._host.wait()

    def result(self) -> SampleResult:
        """The same as host values; waits for them."""
        host = self._host.tolist()
        self._read_tokens(host)
        self._read_logprobs(host)
        return self._result

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
                    result.logprobs[i] = _logprob_entry(result.tokens[i], host[start : start + width])
                start += width


class PendingLogprobs:
    """Log-probabilities of given tokens, on their way to the host."""

    def __init__(self, token_ids: list[int], table: HostCopy):
        self._token_ids = token_ids
        self._table = table

    def result(self) -> list[dict[int, Logprob]]:
        """One entry per token; waits for them."""
        lines = self._table.tolist()
        return [_logprob_entry(token, line) for token, line in zip(self._token_ids, lines, strict=True)]


class Sampler:
    """Samples one token per row. Stateless; on CUDA `launch` does not wait for the device (user processors aside)."""

    def sample(self, logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> SampleResult:
        """`launch`, and wait."""
        return self.launch(logits_RV, rows).result()

    @torch.no_grad()
    def launch(self, logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> PendingSamples:
        """Sample every row.

        Args:
            logits_RV: float tensor [R, V] of any dtype, not modified; R may be 0.
            rows: one per row of `logits_RV`. None with `reads_tokens` may have a pending token.
        """
        assert logits_RV.dim() == 2 and len(logits_RV) == len(rows), "one SampleRow per row of logits"
        count, device = len(rows), logits_RV.device
        nothing: list = [None] * count
        result = SampleResult([-1] * count, nothing[:], nothing[:], nothing[:], nothing[:])
        plain = [i for i, row in enumerate(rows) if _is_plain(row)]
        if len(plain) == count:
            tokens, peaks = row_argmax(logits_RV)
        else:
            tokens, peaks = self._sample_mixed(logits_RV, rows, plain, result)
        groups = _group_by_logprobs(rows)
        parts = [tokens.double(), peaks.double()]
        for num_top, wanted in groups:
            index = to_device(wanted, torch.int64, device)
            parts.append(_logprob_table(_rows(logits_RV, wanted, index), tokens[index], num_top).flatten())
        host = HostCopy(torch.cat(parts))  # one copy for everything
        return PendingSamples(tokens, host, rows, groups, logits_RV.shape[1], result)

    @torch.no_grad()
    def prompt_logprobs(
        self, logits_PV: torch.Tensor, next_token_ids: Sequence[int], num_top: int
    ) -> PendingLogprobs:
        """Log-probabilities of `next_token_ids[i]`, and of the `num_top` most likely tokens, from row i."""
        token_ids = list(next_token_ids)
        ids = to_device(token_ids, torch.int64, logits_PV.device)
        return PendingLogprobs(token_ids, HostCopy(_logprob_table(logits_PV, ids, num_top)))

    def _sample_mixed(self, logits_RV, rows, plain: list[int], result: SampleResult):
        """(tokens [R], row maxima [R]) when at least one row needs more than an argmax."""
        device = logits_RV.device
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
        peaks = torch.zeros(len(rows), dtype=torch.float32, device=device)
        if plain:
            index = torch.tensor(plain).to(device)
            found, peak = row_argmax(logits_RV[index])
            tokens[index], peaks[index] = found, peak.float()
        chosen = sorted(set(range(len(rows))).difference(plain))
        index = torch.tensor(chosen).to(device)
        x_SV = logits_RV[index].float() if plain else logits_RV.to(torch.float32, copy=True)
        x_SV = x_SV.contiguous()
        subset = [rows[i] for i in chosen]
        for i in chosen:
            if rows[i].capture:
                result.raw_logits[i] = logits_RV[i].to(torch.float32, copy=True)
        errors: list[Exception | None] = [None] * len(subset)
        apply_rules(x_SV, subset, errors)
        _run_processors(x_SV, subset, errors)
        found, peak, processed = _choose(x_SV, subset)
        tokens[index], peaks[index] = found, peak
        for place, i in enumerate(chosen):
            result.errors[i] = errors[place]
            result.processed_logits[i] = processed[place]
        return tokens, peaks


def _group_by_logprobs(rows: Sequence[SampleRow]) -> list[tuple[int, list[int]]]:
    """Rows by the number of alternatives they report, so that no row's ties depend on another's number."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.params.logprobs is not None:
            groups.setdefault(row.params.logprobs, []).append(i)
    return sorted(groups.items())


def _is_plain(row: SampleRow) -> bool:
    """Whether the row is an argmax of the raw logits and no more."""
    return row.params.temperature == 0.0 and not row.processors and not row.capture and not has_rules(row)


def _unusable(peak: float) -> Exception:
    if math.isnan(peak):
        return FloatingPointError("the logits contain NaN")
    if peak > 0:
        return FloatingPointError("the logits contain inf, which has no probability")
    return ValueError("the logits are all -inf: masks and processors leave no token to choose")


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


def _rows(logits_RV: torch.Tensor, wanted: list[int], index: torch.Tensor) -> torch.Tensor:
    return logits_RV if len(wanted) == len(logits_RV) else logits_RV[index]


def _logprob_table(logits_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int) -> torch.Tensor:
    """float64 [N, 2 + 2 * num_top]: the token's log-probability and rank, then the top values, then their ids."""
    rows = rows_at_once(logits_NV)
    chunks = zip(logits_NV.split(rows), tokens_N.split(rows), strict=True)
    return torch.cat([_logprob_lines(logits, tokens, num_top) for logits, tokens in chunks])


def _logprob_lines(logits_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int) -> torch.Tensor:
    logprobs = torch.log_softmax(logits_NV.float(), dim=-1)
    num_top = min(num_top, logprobs.shape[1])
    chosen = logprobs.gather(1, tokens_N[:, None])
    rank = (logprobs > chosen).sum(-1, keepdim=True) + 1
    columns = [chosen.double(), rank.double()]
    if num_top:
        values, ids = row_topk(logprobs, num_top)
        columns += [values.double(), ids.double()]
    return torch.cat(columns, dim=1)


def _logprob_entry(token: int, line: list[float]) -> dict[int, Logprob]:
    """{token: Logprob} of a line of `_logprob_table`: the chosen token, then the most likely ones. Ties share a rank."""
    entry = {int(token): Logprob(line[0], int(line[1]))}
    most = (len(line) - 2) // 2
    values, ids = line[2 : 2 + most], line[2 + most :]
    rank = 1
    for place in range(most):
        if place and values[place] != values[place - 1]:
            rank = place + 1
        entry.setdefault(int(ids[place]), Logprob(values[place], rank))
    return entry
