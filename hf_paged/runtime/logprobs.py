"""Log-probabilities of chosen tokens, their ranks, and the most likely tokens, as one table per batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..base.types import Logprob
from .draw import rows_at_once
from .sample_row import SampleRow
from .warpers import row_topk


def group_by_logprobs(rows: Sequence[SampleRow]) -> list[tuple[int, list[int]]]:
    """Rows by the number of alternatives they report, so that no row's ties depend on another's number."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.params.logprobs is not None:
            groups.setdefault(row.params.logprobs, []).append(i)
    return sorted(groups.items())


def logprob_table(logits_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int) -> torch.Tensor:
    """float64 [N, 2 + 2 * num_top]: the token's log-probability and rank, then the top values, then their ids."""
    rows = rows_at_once(logits_NV)
    chunks = zip(logits_NV.split(rows), tokens_N.split(rows), strict=True)
    return torch.cat([_lines(logits, tokens, num_top) for logits, tokens in chunks])


def chosen_logprobs(logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """float32 [N]: the first column of `logprob_table`, of logits divided by `temperature`."""
    rows = rows_at_once(logits_NV)
    parts = []
    for logits, tokens in zip(logits_NV.split(rows), tokens_N.split(rows), strict=True):
        logits = logits.float() if temperature == 1 else logits.float() / temperature
        parts.append(_logprobs(logits).gather(1, tokens[:, None])[:, 0])
    return torch.cat(parts)


def _logprobs(logits_NV: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_NV.float(), dim=-1)


def _lines(logits_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int) -> torch.Tensor:
    logprobs = _logprobs(logits_NV)
    num_top = min(num_top, logprobs.shape[1])
    chosen = logprobs.gather(1, tokens_N[:, None])
    rank = (logprobs > chosen).sum(-1, keepdim=True) + 1
    columns = [chosen.double(), rank.double()]
    if num_top:
        values, ids = row_topk(logprobs, num_top)
        columns += [values.double(), ids.double()]
    return torch.cat(columns, dim=1)


def logprob_entry(token: int, line: list[float]) -> dict[int, Logprob]:
    """{token: Logprob} of a line of `logprob_table`: the chosen token, then the most likely ones. Ties share a rank."""
    entry = {int(token): Logprob(line[0], int(line[1]))}
    most = (len(line) - 2) // 2
    values, ids = line[2 : 2 + most], line[2 + most :]
    rank = 1
    for place in range(most):
        if place and values[place] != values[place - 1]:
            rank = place + 1
        entry.setdefault(int(ids[place]), Logprob(values[place], rank))
    return entry
