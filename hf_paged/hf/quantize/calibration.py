"""Calibration text: read, made into sequences, and measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.errors import InvalidArgument

HELD_OUT = 10  # one sequence in so many, the last ones, is for measuring only


def read_texts(file: Path, tokenizer) -> list[str]:
    """Documents: a text file is one; each line of a .jsonl file has {"text": ...}, {"prompt": ...} or {"messages": [...]}.

    Raises InvalidArgument, naming the line, for anything else.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"calibration: {file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if file.suffix != ".jsonl":
        return [content]
    lines = enumerate(content.splitlines(), 1)
    return [_document(line, f"calibration: {file}, line {number}", tokenizer) for number, line in lines if line.strip()]


def _document(line: str, where: str, tokenizer) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{where}: not an object")
    for name in ("text", "prompt"):
        if isinstance(entry.get(name), str):
            return entry[name]
    if isinstance(entry.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidArgument(f"{where}: messages, but this model has no chat template")
        return tokenizer.apply_chat_template(entry["messages"], tokenize=False)
    raise InvalidArgument(f'{where}: expected "text", "prompt" or "messages"')


def to_sequences(texts: list[str], tokenizer, length: int) -> Tensor:
    """Token ids [S, length] of the documents one after another, each ended by the model's end of text.

    Every sequence begins with the tokenizer's beginning of text, if it has one. What does not fill a sequence is dropped.
    """
    start = tokenizer("a").input_ids[:1]
    start = start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
    rest = length - len(start)
    count = len(tokens) // rest
    body = torch.tensor(tokens[: count * rest], dtype=torch.int64).view(count, rest)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), body], 1)


def split(sequences: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(those to calibrate on, at most `most`, from all over the text; those held out, from its end).

    Raises InvalidArgument if there are fewer than three.
    """
    if len(sequences) < 3:
        raise InvalidArgument(
            f"calibration: the text gives {len(sequences)} sequences of {sequences.shape[1]} tokens, and at least 3 are "
            "needed (many more are better); take more text, or shorter sequences"
        )
    held_out = math.ceil(len(sequences) / HELD_OUT)
    rest = sequences[:-held_out]
    places = torch.linspace(0, len(rest) - 1, min(most, len(rest))).round().long()
    return rest[places], sequences[-held_out:][:most]


def perplexity(model: nn.Module, sequences: Tensor, done: Callable[[str], None] = lambda name: None) -> float:
    """exp of the mean negative log-likelihood of the tokens of sequences [S, L], each but its first.

    `done` is called after every sequence.
    """
    device, total = next(model.parameters()).device, 0.0
    for ids in sequences.to(device):
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
        done(f"{len(ids)} tokens")
    return math.exp(total / (len(sequences) * (sequences.shape[1] - 1)))
