"""Workloads: token prompts cut from real English text, lengths drawn from a seeded generator.

The text is the Python language reference that CPython itself carries (`pydoc_data.topics`), so nothing is downloaded.
It changes a little between Python versions; `fingerprint` goes into the results, so that runs can be told apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MIXED_REQUESTS, MIXED_PROMPT, MIXED_OUTPUT = 64, (16, 512), (16, 128)
SHARED_REQUESTS, SHARED_PREFIX, SHARED_OWN, SHARED_OUTPUT = 32, 384, (16, 48), 32
CHAT_REQUESTS, CHAT_TURNS, CHAT_SYSTEM, CHAT_OWN, CHAT_OUTPUT = 32, 4, 96, (16, 64), 48
LONG_REQUESTS, LONG_PROMPT, LONG_OUTPUT = 8, (1024, 1792), 64
SHORT_REQUESTS, SHORT_PROMPT, SHORT_OUTPUT = 32, (16, 128), 16


@dataclass(frozen=True)
class Request:
    """One request: prompt token ids and how many tokens it generates at most."""

    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Workload:
    name: str
    requests: tuple[Request, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.max_new_tokens for request in self.requests)

    def fingerprint(self) -> str:
        """Equal for equal workloads, whatever machine made them."""
        return hashlib.sha256(repr(self.requests).encode()).hexdigest()[:12]


def mixed(tokenizer, *, seed: int = 0, count: int = MIXED_REQUESTS) -> Workload:
    """Prompts of 16 to 512 tokens, log-uniform; outputs of 16 to 128 tokens, uniform."""
    rng = random.Random(seed)
    text = _reference_tokens(tokenizer)
    low, high = MIXED_PROMPT
    requests = []
    for _ in range(count):
        length = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        requests.append(Request(_cut(text, length, rng), rng.randint(*MIXED_OUTPUT)))
    return Workload("mixed", tuple(requests))


def shared(tokenizer, *, seed: int = 0, count: int = SHARED_REQUESTS) -> Workload:
    """One prefix of 384 tokens, then 16 to 48 tokens of each request's own; 32 tokens of output."""
    rng = random.Random(seed + 1)
    text = _reference_tokens(tokenizer)
    prefix = _cut(text, SHARED_PREFIX, rng)
    own = (_cut(text, rng.randint(*SHARED_OWN), rng) for _ in range(count))
    return Workload("shared", tuple(Request(prefix + tail, SHARED_OUTPUT) for tail in own))


def chat(tokenizer, *, seed: int = 0, count: int = CHAT_REQUESTS) -> Workload:
    """Conversations of 4 turns, one request for each turn: all before it, then 16 to 64 tokens of its own.

    Answers of turns before are 48 tokens of text, so that a workload does not depend on what a model says. All begin with
    the same 96 tokens. First turns come first, then second ones.
    """
    rng = random.Random(seed + 2)
    text = _reference_tokens(tokenizer)
    histories = [_cut(text, CHAT_SYSTEM, rng)] * -(-count // CHAT_TURNS)
    requests = []
    for _ in range(CHAT_TURNS):
        for place, history in enumerate(histories):
            prompt = history + _cut(text, rng.randint(*CHAT_OWN), rng)
            requests.append(Request(prompt, CHAT_OUTPUT))
            histories[place] = prompt + _cut(text, CHAT_OUTPUT, rng)
    return Workload("chat", tuple(requests[:count]))


def long(tokenizer, *, seed: int = 0, count: int = LONG_REQUESTS) -> Workload:
    """Prompts of 1,024 to 1,792 tokens, 64 tokens of output."""
    rng = random.Random(seed + 3)
    text = _reference_tokens(tokenizer)
    return Workload("long", tuple(Request(_cut(text, rng.randint(*LONG_PROMPT), rng), LONG_OUTPUT) for _ in range(count)))


def short(tokenizer, *, seed: int = 0, count: int = SHORT_REQUESTS) -> Workload:
    """Prompts of 16 to 128 tokens, 16 tokens of output: for loads of which many are run."""
    rng = random.Random(seed + 5)
    text = _reference_tokens(tokenizer)
    return Workload("short", tuple(Request(_cut(text, rng.randint(*SHORT_PROMPT), rng), SHORT_OUTPUT) for _ in range(count)))


def from_trace(path: str | Path, tokenizer, *, seed: int = 0, count: int | None = None) -> Workload:
    """The first `count` requests (None: all) of a file with one JSON object a line: {"prompt": text or token ids, "output_tokens": 64}, or
    {"prompt_tokens": 300, "output_tokens": 64} for so many tokens of text.

    Raises ValueError, naming the line, for whatever is none.
    """
    rng, path = random.Random(seed + 4), Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_traced(json.loads(line), tokenizer, rng))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"{path} has no requests")
    return Workload(path.stem, tuple(requests[:count]))


WORKLOADS = {"mixed": mixed, "shared": shared, "chat": chat, "long": long, "short": short}


def check_name(name: str) -> None:
    """Raises ValueError unless it is one of WORKLOADS or a path of a trace."""
    if name not in WORKLOADS and not name.endswith(".jsonl"):
        raise ValueError(f"workloads has no {name!r}; there are {', '.join(WORKLOADS)}, and paths of *.jsonl")


def make(name: str, tokenizer, *, seed: int = 0, count: int | None = None) -> Workload:
    """A workload by its name or its trace's path. `count` None: as many requests as it has by itself."""
    check_name(name)
    if name.endswith(".jsonl"):
        return from_trace(name, tokenizer, seed=seed, count=count)
    return WORKLOADS[name](tokenizer, seed=seed, **({} if count is None else {"count": count}))


def _traced(entry, tokenizer, rng: random.Random) -> Request:
    if not isinstance(entry, dict):
        raise ValueError(f"must be an object, got {type(entry).__name__}")
    if unknown := entry.keys() - {"prompt", "prompt_tokens", "output_tokens"}:
        raise ValueError(f"no field {min(unknown)!r}; there are prompt, prompt_tokens and output_tokens")
    if ("prompt" in entry) == ("prompt_tokens" in entry):
        raise ValueError("needs prompt or prompt_tokens, and not both")
    output, text = _count("output_tokens", entry.get("output_tokens")), _reference_tokens(tokenizer)
    if "prompt_tokens" in entry:
        length = _count("prompt_tokens", entry["prompt_tokens"])
        if length >= len(text):
            raise ValueError(f"prompt_tokens must be below the {len(text)} tokens of the text, got {length}")
        return Request(_cut(text, length, rng), output)
    prompt = entry["prompt"]
    tokens = tokenizer(prompt, verbose=False).input_ids if isinstance(prompt, str) else prompt
    if not isinstance(tokens, list) or not tokens or any(type(token) is not int or token < 0 for token in tokens):
        raise ValueError("prompt must be text or a list of token ids, and not empty")
    return Request(tuple(tokens), output)


def _count(name: str, value) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def windows(tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens, evenly over the text."""
    text = _reference_tokens(tokenizer)
    starts = (i * (len(text) - length) // count for i in range(count))
    return [text[start : start + length] for start in starts]


def piece(tokenizer, length: int, rng: random.Random) -> tuple[int, ...]:
    """`length` tokens from anywhere in the text."""
    return _cut(_reference_tokens(tokenizer), length, rng)


def slices(workload: Workload, parts: int, size: int, *, seed: int = 0) -> list[list[int]]:
    """`parts` lists of `size` request indices, each a like mix of small and large requests.

    Requests are sorted by length and dealt out in turn, so no index repeats until all have been dealt.
    """
    rng = random.Random(seed)
    requests = workload.requests
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt) + 8 * requests[i].max_new_tokens)
    wanted = min(parts * size, len(order))
    spread = [order[i * len(order) // wanted] for i in range(wanted)]  # evenly over all lengths
    dealt = [[spread[(part + parts * turn) % wanted] for turn in range(size)] for part in range(parts)]
    for part in dealt:
        rng.shuffle(part)
    return dealt


@lru_cache(maxsize=1)
def _reference_tokens(tokenizer) -> list[int]:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]


def _cut(text: list[int], length: int, rng: random.Random) -> tuple[int, ...]:
    start = rng.randrange(len(text) - length)
    return tuple(text[start : start + length])
