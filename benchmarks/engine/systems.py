"""The systems under comparison. Each takes requests and returns a `Run`: tokens, seconds and KV memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import hf_paged

from ..latency import Answer, Feed
from .workload import Request

STOCK_ONE, STOCK_BATCH = "stock, one at a time", "stock, padded batches"
STOCK_CONTINUOUS, PAGED = "stock, continuous batching", "hf_paged"
BATCH = 8
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Run:
    """What one system did with some requests, in their order.

    `tokens` are each request's new tokens; `kv_bytes` the most the KV cache held at once, and `kv` what it held over time:
    pairs of seconds since the start and bytes. `answers` say when tokens came.
    """

    tokens: list[list[int]]
    seconds: float
    kv_bytes: int
    kv: list[tuple[float, int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def rate(self) -> float:
        """Output tokens per second. Padding and tokens beyond what a request asked for do not count."""
        return self.output_tokens / self.seconds


class _Stopwatch:
    """A streamer of `generate`: the moments at which a batch has tokens. The first call brings the prompts."""

    def __init__(self):
        self.moments: list[float] = []

    def put(self, value) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def run_stock(
    model, requests: Sequence[Request], *, batch: int = 1, ignore_eos: bool = False, progress: Progress = lambda n: None,
    feed: Feed | None = None,
) -> Run:  # fmt: skip
    """Untouched `generate`, greedy, at most `batch` requests at a time in the order given, padded on the left.

    A batch runs to its longest output; what a row makes beyond its own length is cut off. With `feed`, a batch is what has
    come when the batch before it ends, and a row's tokens count as they are made.
    """
    eos = eos_ids(model)
    tokens: list[list[int]] = [[] for _ in requests]
    kv: list[tuple[float, int]] = []
    timed, feed = feed is not None, feed or Feed.at_once(len(requests))
    feed.start()
    while indices := feed.take(batch):
        group = [requests[index] for index in indices]
        begun, watch = feed.now, _Stopwatch() if timed else None
        rows, cache = _generate(model, group, eos, ignore_eos, watch)
        made = max(request.max_new_tokens for request in group)
        width = max(len(request.prompt) for request in group)
        kv += [(begun, cache * width // (width + made)), (feed.now, cache), (feed.now, 0)]
        for index, request, row in zip(indices, group, rows, strict=True):
            tokens[index] = _until_eos(row[: request.max_new_tokens], () if ignore_eos else eos)
            for moment in watch.moments[1 : 1 + len(tokens[index])] if timed else ():
                feed.token(index, moment - feed.begun)
            feed.done(index)
            progress(len(tokens[index]))
    return Run(tokens, feed.now, max((size for _, size in kv), default=0), kv, feed.answers)


def _generate(
    model, group: Sequence[Request], eos: tuple[int, ...], ignore_eos: bool, streamer
) -> tuple[list[list[int]], int]:
    """(new tokens of each row, bytes of the cache in the end)."""
    pad = eos[0] if eos else 0
    width = max(len(request.prompt) for request in group)
    longest = max(request.max_new_tokens for request in group)
    rows = [[pad] * (width - len(request.prompt)) + list(request.prompt) for request in group]
    mask = [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in group]
    out = model.generate(
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        max_new_tokens=longest,
        min_new_tokens=longest if ignore_eos else None,
        pad_token_id=pad,
        return_dict_in_generate=True,
        streamer=streamer,
    )
    return out.sequences[:, width:].tolist(), cache_bytes(out.past_key_values)


def run_paged(
    engine,
    requests: Sequence[Request],
    *,
    ignore_eos: bool = False,
    cache_salt: str | None = None,
    progress: Progress = lambda n: None,
    feed: Feed | None = None,
) -> Run:
    """Through the engine, greedy, all requests at once or as `feed` brings them.

    A fresh `cache_salt` keeps an earlier run's prefixes out.
    """
    engine.reset_stats()
    timed, feed = feed is not None, feed or Feed.at_once(len(requests))
    tokens: list[list[int]] = [[] for _ in requests]
    places: dict[str, int] = {}
    kv: list[tuple[float, int]] = []
    feed.start()
    while not feed.exhausted or engine.has_unfinished():
        for index in feed.take(wait=not engine.has_unfinished()):
            params = greedy(requests[index].max_new_tokens, ignore_eos)
            places[engine.add(list(requests[index].prompt), params, cache_salt=cache_salt)] = index
        for output in engine.step():
            if output.error is not None:
                raise output.error
            index, new = places[output.request_id], output.outputs[0].token_ids
            if timed and (more := len(new) - (feed.answers[index].num_tokens or 0)):
                feed.token(index, count=more)
            if output.finished:
                tokens[index] = list(new)
                feed.done(index)
                progress(len(new))
        if timed:
            kv.append((feed.now, engine.stats()["kv_bytes_in_use"]))
    return Run(tokens, feed.now, engine.stats()["kv_bytes_peak"], kv, feed.answers)


def greedy(max_tokens: int, ignore_eos: bool = False):
    """Greedy sampling parameters. Ignoring EOS means it cannot be chosen, as with stock's `min_new_tokens`."""
    return hf_paged.SamplingParams(temperature=0.0, max_tokens=max_tokens, min_tokens=max_tokens if ignore_eos else 0)


def cache_bytes(cache) -> int:
    """Bytes of the keys and values in a transformers cache."""
    return sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "keys", None) is not None
    )


def kv_bytes_per_token(model) -> int:
    """Bytes one token takes in stock's cache, seen in a forward pass of four tokens."""
    with torch.no_grad():
        cache = model(torch.ones(1, 4, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    return cache_bytes(cache) // 4


def weight_bytes(model) -> int:
    """Bytes of a model's parameters and buffers; what several share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def static_batch_bytes(per_token: int, requests: Sequence[Request], batch: int) -> int:
    """KV bytes of the largest padded batch: every row as wide as the longest prompt and the longest output."""
    return max(
        per_token * len(group) * (max(len(r.prompt) for r in group) + max(r.max_new_tokens for r in group))
        for group in (requests[first : first + batch] for first in range(0, len(requests), batch))
    )


@dataclass(frozen=True)
class Difference:
    """The first token in which two systems differ, and how close stock's two best logits were there."""

    request: int
    position: int
    expected: int | None
    got: int | None
    top2_gap: float

    def __str__(self):
        return (
            f"request {self.request}, new token {self.position}: stock {self.expected}, here {self.got} "
            f"(stock's two best logits differ by {self.top2_gap:.2g})"
        )


def first_difference(model, index: int, request: Request, expected: list[int], got: list[int]) -> Difference | None:
    """None if both token lists are the same. `model` is the stock model that decides how close the call was."""
    if expected == got:
        return None
    pairs = zip(expected, got, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    sequence = torch.tensor([list(request.prompt) + expected[:place]], device=model.device)
    with torch.no_grad():
        best = model(sequence).logits[0, -1].float().topk(2).values
    at = [tokens[place] if place < len(tokens) else None for tokens in (expected, got)]
    return Difference(index, place, at[0], at[1], float(best[0] - best[1]))


def eos_ids(model) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _until_eos(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return tokens[: end + 1]
