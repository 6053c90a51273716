"""Numbers for Prometheus: /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ...base.types import RequestDelta
from ...engine.async_engine import AsyncEngine
from .errors import describe

SHORT = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)

# Name after "hf_paged_", what it counts, and the engine's own name for it.
_GAUGES = (
    ("requests_running", "Sequences running.", "running"),
    ("requests_waiting", "Requests waiting.", "waiting"),
    ("kv_bytes_in_use", "KV cache that running requests hold, in bytes.", "kv_bytes_in_use"),
    ("kv_bytes_allocated", "Memory of the KV cache, in bytes.", "kv_bytes_allocated"),
)
_COUNTERS = (
    ("steps", "Steps of the engine.", "steps"),
    ("preemptions", "Sequences that had to give their blocks back.", "preemptions"),
    ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    ("prefix_cache_queried_tokens", "Prompt tokens looked for in the prefix cache.", "prefix_queried_tokens"),
)


class Metrics:
    """What happens to the requests of one app, and what its engine says of itself. Each app has a registry of its own."""

    def __init__(self, engine: AsyncEngine, model_name: str):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(engine, model_name))

        def histogram(name: str, text: str, buckets: tuple) -> Histogram:
            made = Histogram(f"hf_paged_{name}", text, ["model"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", LONG)
        self._between = histogram("inter_token_seconds", "From one token of a request to the next, on average.", SHORT)
        self._whole = histogram("request_seconds", "From arrival to the last token.", LONG)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens generated for a prompt.", TOKENS)
        self._ends = Counter("hf_paged_requests", "Requests that ended.", ["model", "reason"], registry=self.registry)
        self._model_name = model_name

    async def watched(self, deltas: AsyncIterator[RequestDelta]) -> AsyncIterator[RequestDelta]:
        """`deltas` of one request, counted on their way."""
        tokens, reason = 0, "abort"  # of whom nobody reads to the end
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    tokens += sum(len(completion.token_ids) for completion in delta.outputs)
                    if delta.finished:
                        reason = delta.outputs[-1].finish_reason or "stop"
                        self._finished(delta, tokens)
                    yield delta
        except Exception as error:
            reason = describe(error).code or "error"
            raise
        finally:
            self._ends.labels(self._model_name, reason).inc()

    def _finished(self, delta: RequestDelta, tokens: int) -> None:
        times = delta.metrics
        end = times.finished or time.monotonic()
        self._prompt.observe(len(delta.prompt_token_ids))
        self._generated.observe(tokens)
        self._whole.observe(end - times.arrival)
        if times.first_token is not None:
            self._first.observe(times.first_token - times.arrival)
            if tokens > 1:
                self._between.observe((end - times.first_token) / (tokens - 1))


class _EngineNumbers(Collector):
    """The engine's counts, read when they are asked for."""

    def __init__(self, engine: AsyncEngine, model_name: str):
        self._engine, self._model_name = engine, model_name

    def describe(self):
        return []

    def collect(self):
        stats = self._engine.engine.stats()
        for kind, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, key in metrics:
                family = kind(f"hf_paged_{name}", text, labels=["model"])
                family.add_metric([self._model_name], stats[key])
                yield family


def router(metrics: Metrics) -> APIRouter:
    routes = APIRouter()

    @routes.get("/metrics")
    async def scrape() -> Response:
        text = await asyncio.to_thread(generate_latest, metrics.registry)  # the engine may be in the middle of a step
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return routes
