"""The device's sampler against the CPU's: the same tokens from the same logits, options and seeds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_paged import SamplingParams
from hf_paged.runtime.sampler import Sampler, SampleRow
from hf_paged_kernels import sampling as kernels

from .batches import randn
from .check_attention import BF16, FP32
from .checking import Case, Setting, compare, equal

VOCABULARIES = {"Llama 3": 128256, "Qwen 3": 151936}
# exp is rounded differently on the two: about one draw in a hundred thousand over a flat vocabulary may be another
# token, and a token that lies on the edge of a top-p set may be in it on one side only.
OTHER_DRAWS = 0.01
OPTIONS = (
    dict(),
    dict(temperature=0.6),
    dict(top_k=50),
    dict(top_p=0.9),
    dict(min_p=0.05),
    dict(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01),
    dict(temperature=0.0),
    dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, temperature=0.8),
    dict(logit_bias={3: 5.0, 11: -100.0}),
    dict(min_tokens=50, stop_token_ids=[5, 7]),
    dict(allowed_token_ids=list(range(100, 140))),
)


def argmax(setting: Setting) -> Iterator[Case]:
    """The first of equal maxima, which bf16 has often."""
    for name, vocab in _vocabularies(setting).items():
        for dtype in (BF16, FP32):
            for rows in (1, 3) if setting.small else (1, 8, 256):
                logits = randn(rows, vocab, dtype=dtype, device=setting.device, seed=rows)
                tokens, peaks = kernels.argmax(logits, backend=setting.backend)
                first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
                yield equal(f"{name}, {rows} rows, {dtype}", tokens, first)
                yield equal(f"{name}, {rows} rows, {dtype}, maxima", peaks, logits.amax(1).float())


def draws(setting: Setting) -> Iterator[Case]:
    """Rows of every option in one batch, peaked and flat ones."""
    ours = Sampler(setting.device, setting.backend)
    for name, vocab in _vocabularies(setting).items():
        for width in (1.0, 4.0):
            rounds = 1 if setting.small else 8
            other = total = 0
            for turn in range(rounds):
                rows = _rows(vocab, turn, 1 if setting.small else 4)
                logits = randn(len(rows), vocab, dtype=FP32, device="cpu", seed=turn).mul_(width)
                got = ours.sample(logits.to(setting.device), rows)
                expected = Sampler("cpu", "reference").sample(logits, rows)
                problems = [error for error in (*got.errors, *expected.errors) if error is not None]
                if problems:
                    raise problems[0]
                other += sum(a != b for a, b in zip(got.tokens, expected.tokens, strict=True))
                total += len(rows)
            yield Case(f"{name}, logits of width {width}: share of other tokens in {total}", other / total, OTHER_DRAWS)


def log_probabilities(setting: Setting) -> Iterator[Case]:
    ours = Sampler(setting.device, setting.backend)
    for name, vocab in _vocabularies(setting).items():
        rows = [SampleRow(SamplingParams(temperature=0.0, logprobs=5), [1, 2, 3], 3, seed=i) for i in range(4)]
        logits = randn(4, vocab, dtype=FP32, device="cpu", seed=7)
        results = ours.sample(logits.to(setting.device), rows), Sampler("cpu", "reference").sample(logits, rows)
        tables = [
            torch.tensor([[entry.logprob for entry in row.values()] for row in result.logprobs]) for result in results
        ]
        yield compare(f"{name}: five best", *tables, FP32)


AREAS = {"sampling-argmax": argmax, "sampling-draws": draws, "sampling-logprobs": log_probabilities}


def _vocabularies(setting: Setting) -> dict[str, int]:
    return {"small": 311} if setting.small else VOCABULARIES


def _rows(vocab: int, turn: int, copies: int) -> list[SampleRow]:
    """`copies` rows of each option, with histories and seeds of their own."""
    generator = torch.Generator().manual_seed(turn)
    rows = []
    for index in range(copies * len(OPTIONS)):
        options = dict(temperature=1.0, max_tokens=100) | OPTIONS[index % len(OPTIONS)]
        history = torch.randint(0, vocab, (20,), generator=generator).tolist()
        eos = frozenset({2})
        rows.append(SampleRow(SamplingParams(**options), history, 12, seed=1000 * turn + index, eos_token_ids=eos))
    return rows
