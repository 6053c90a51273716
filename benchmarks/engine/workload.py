"""Workloads: token prompts cut from real English text, lengths drawn from a seeded generator.

The text is the Python language reference that CPython itself carries (`pydoc_data.topics`), so nothing is downloaded.
It changes a little between Python versions; `fingerprint` goes into the results, so that runs can be told apart.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from functools import lru_cache

MIXED_REQUESTS, MIXED_PROMPT, MIXED_OUTPUT = 64, (16, 512), (16, 128)
SHARED_REQUESTS, SHARED_PREFIX, SHARED_OWN, SHARED_OUTPUT = 32, 384, (16, 48), 32


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
