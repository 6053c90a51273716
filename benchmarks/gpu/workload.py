"""The workload of nano-vllm's benchmark: 256 requests of random tokens, 100 to 1024 in and 100 to 1024 out, seed 0."""

from __future__ import annotations

import random

from ..engine.workload import Request, Workload

LENGTHS = (100, 1024)
TOKENS = 10000  # ids are drawn from [0, TOKENS]


def nano_vllm(*, count: int = 256, lengths: tuple[int, int] = LENGTHS, vocab_size: int = TOKENS + 1) -> Workload:
    """By default 142,827 prompt and 133,966 output tokens, drawn in that benchmark's own order."""
    rng = random.Random(0)
    most = min(TOKENS, vocab_size - 1)
    prompts = [tuple(rng.randint(0, most) for _ in range(rng.randint(*lengths))) for _ in range(count)]
    return Workload("nano-vllm", tuple(Request(prompt, rng.randint(*lengths)) for prompt in prompts))


def uniform(vocab_size: int, *, count: int, prompt: int, output: int, seed: int = 1) -> Workload:
    """`count` requests of one size."""
    rng = random.Random(seed)
    tokens = [tuple(rng.randrange(vocab_size) for _ in range(prompt)) for _ in range(count)]
    return Workload(f"{count} x {prompt}", tuple(Request(row, output) for row in tokens))


def dwindling(vocab_size: int, *, count: int, prompt: int = 32) -> Workload:
    """For a warm-up: short requests that end two by two, so that steps of every size up to `count` occur."""
    requests = uniform(vocab_size, count=count, prompt=prompt, output=1, seed=2).requests
    return Workload("warm-up", tuple(Request(one.prompt, 2 + i // 2) for i, one in enumerate(requests)))
