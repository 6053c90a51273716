"""Rules on logits before sampling: bias, allowed tokens, penalties, bad words, minimum length, form. All in place.

Rows without a rule cost nothing; token lists of all rows are flattened into one index over the [R, V] logits, so
the work is a few gathers and scatters whatever the number of rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch

from ..base.errors import InvalidArgument

_NEG_INF = float("-inf")


def has_rules(row) -> bool:
    """Whether `apply_rules` would change this row's logits now."""
    params = row.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(row.bad_words_ids)
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or row.num_output < params.min_tokens
        or row.constraint is not None
    )


def apply_rules(logits_RV: torch.Tensor, rows: list, errors: list[Exception | None]) -> None:
    """Apply every rule of every row, in transformers' order. A row whose rule is wrong gets an entry in `errors`."""
    _add_bias(logits_RV, rows, errors)
    _keep_allowed(logits_RV, rows, errors)
    _repetition(logits_RV, rows)
    _presence_and_frequency(logits_RV, rows)
    _forbid(logits_RV, rows, errors)
    _constrain(logits_RV, rows, errors)


def _flat_index(token_lists: list[tuple[int, Iterable[int]]], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(index into the flattened [R, V] logits, entry of `token_lists` it came from), on the CPU.

    Ids outside the vocabulary are dropped: placeholders of images, or tokens the head cannot produce.
    """
    buffer, lengths = array("q"), []
    for _, tokens in token_lists:
        part = array("q", tokens)
        lengths.append(len(part))
        buffer += part
    if not buffer:
        empty = torch.empty(0, dtype=torch.int64)
        return empty, empty
    tokens = torch.frombuffer(buffer, dtype=torch.int64)
    entry = torch.repeat_interleave(torch.tensor(lengths), output_size=len(tokens))
    base = torch.tensor([row for row, _ in token_lists]) * vocab_size
    flat, inside = tokens + base[entry], (tokens >= 0) & (tokens < vocab_size)
    return (flat, entry) if bool(inside.all()) else (flat[inside], entry[inside])


def _add_bias(logits_RV: torch.Tensor, rows: list, errors: list) -> None:
    lists, values, vocab_size = [], [], logits_RV.shape[1]
    for index, row in enumerate(rows):
        bias = row.params.logit_bias
        if bias:
            if max(bias) >= vocab_size:
                errors[index] = outside("logit_bias", max(bias), vocab_size)
                continue
            lists.append((index, bias.keys()))
            values.extend(bias.values())
    if lists:
        flat, _ = _flat_index(lists, vocab_size)
        added = torch.tensor(values, dtype=torch.float32).to(logits_RV.device)
        logits_RV.view(-1).index_add_(0, flat.to(logits_RV.device), added)


def _keep_allowed(logits_RV: torch.Tensor, rows: list, errors: list) -> None:
    vocab_size = logits_RV.shape[1]
    for index, row in enumerate(rows):
        allowed = row.params.allowed_token_ids
        if allowed is None:
            continue
        if max(allowed) >= vocab_size:
            errors[index] = outside("allowed_token_ids", max(allowed), vocab_size)
            continue
        ids = torch.tensor(allowed).to(logits_RV.device)
        kept = logits_RV[index][ids]
        logits_RV[index].fill_(_NEG_INF)[ids] = kept


def _repetition(logits_RV: torch.Tensor, rows: list) -> None:
    """score / penalty where positive, score * penalty where negative, once per token in prompt or output."""
    chosen = [index for index, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not chosen:
        return
    flat, entry = _flat_index([(index, rows[index].token_ids) for index in chosen], logits_RV.shape[1])
    penalty = torch.tensor([rows[index].params.repetition_penalty for index in chosen], dtype=torch.float32)[entry]
    flat, penalty = flat.to(logits_RV.device), penalty.to(logits_RV.device)
    logits = logits_RV.view(-1)
    score = logits[flat]
    logits[flat] = torch.where(score < 0, score * penalty, score / penalty)  # repeats write the same value


def _presence_and_frequency(logits_RV: torch.Tensor, rows: list) -> None:
    """score - frequency * count - presence, for tokens of the output."""
    lists, frequency, presence = [], [], []
    for index, row in enumerate(rows):
        params = row.params
        if params.presence_penalty or params.frequency_penalty:
            lists.append((index, row.token_ids[row.num_prompt :]))
            frequency.append(params.frequency_penalty)
            presence.append(params.presence_penalty)
    if not lists:
        return
    vocab_size = logits_RV.shape[1]
    flat, counts = torch.unique(_flat_index(lists, vocab_size)[0], return_counts=True)
    place = torch.zeros(len(rows), dtype=torch.int64)
    place[torch.tensor([index for index, _ in lists])] = torch.arange(len(lists))
    entry = place[flat // vocab_size]
    by_count = torch.tensor(frequency, dtype=torch.float32)[entry] * counts
    once = torch.tensor(presence, dtype=torch.float32)[entry]
    flat, device = flat.to(logits_RV.device), logits_RV.device
    logits = logits_RV.view(-1)
    logits[flat] = logits[flat] - by_count.to(device) - once.to(device)


def _forbid(logits_RV: torch.Tensor, rows: list, errors: list) -> None:
    vocab_size, lists = logits_RV.shape[1], []
    for index, row in enumerate(rows):
        forbidden = []
        if row.bad_words_ids:
            forbidden = _completions(row.bad_words_ids, row.token_ids, row.eos_token_ids)
            worst = max(forbidden, default=0)
            if worst >= vocab_size:
                errors[index] = outside("bad_words", worst, vocab_size)
                continue
        params = row.params
        if row.num_output < params.min_tokens:
            forbidden += params.stop_token_ids
            if not params.ignore_eos:
                forbidden += row.eos_token_ids
        if forbidden:
            lists.append((index, forbidden))
    if lists:
        flat, _ = _flat_index(lists, vocab_size)
        logits_RV.view(-1).index_fill_(0, flat.to(logits_RV.device), _NEG_INF)


def _constrain(logits_RV: torch.Tensor, rows: list, errors: list) -> None:
    """Only tokens after which the output can still have its form."""
    places, allowed = [], []
    for index, row in enumerate(rows):
        if row.constraint is None or errors[index] is not None:
            continue
        try:
            mask = row.constraint.allowed(row.token_ids[row.num_prompt :], guessed=len(row.guesses))
        except InvalidArgument as error:
            errors[index] = error
            continue
        if mask is not None:
            places.append(index)
            allowed.append(mask)
    if places:
        index = torch.tensor(places).to(logits_RV.device)
        forbidden = ~torch.stack(allowed).to(logits_RV.device)
        logits_RV[index] = logits_RV[index].masked_fill(forbidden, _NEG_INF)


def _completions(words: list[list[int]], token_ids, eos_token_ids) -> list[int]:
    """The tokens that would complete a bad word now. A word that is only EOS never counts, as in transformers."""
    last = token_ids[-1] if len(token_ids) else None
    found = []
    for word in words:
        prefix = len(word) - 1
        if prefix == 0:
            if word[0] not in eos_token_ids:
                found.append(word[0])
        elif word[-2] == last and list(token_ids[-prefix:]) == list(word[:-1]):
            found.append(word[-1])
    return found


def outside(name: str, token: int, vocab_size: int) -> InvalidArgument:
    return InvalidArgument(f"{name} has token {token}, outside the vocabulary of {vocab_size} tokens")
