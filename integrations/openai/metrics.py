"""Numbers for Prometheus: /metrics. Names are vLLM's, under hf_paged: instead of vllm:."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import AsyncIterator

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ...base.sampling_params import SamplingParams
from ...base.types import RequestDelta
from ...engine.async_engine import AsyncEngine
from .errors import describe
from .observation import Observation, Run, current

PREFIX = "hf_paged:"
SHORT = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
LEFT = "client_closed_request"  # nobody read to the end

# Name, what it counts, and the engine's own name for it.
_GAUGES = (
    ("num_requests_running", "Sequences running.", "running"),
    ("num_requests_waiting", "Requests waiting.", "waiting"),
    ("kv_cache_bytes_in_use", "KV cache that running requests hold, in bytes.", "kv_bytes_in_use"),
    ("kv_cache_bytes_allocated", "Memory of the KV cache, in bytes.", "kv_bytes_allocated"),
)
_COUNTERS = (
    ("steps", "Steps of the engine.", "steps"),
    ("num_preemptions", "Sequences that had to give their blocks back.", "preemptions"),
    ("num_swaps_out", "Of those, copied to host memory.", "swaps_out"),
    ("num_swaps_in", "Sequences that came back from host memory.", "swaps_in"),
    ("host_cache_hits", "Prompt tokens of the prefix cache that came from host memory.", "host_hit_tokens"),
    ("disk_cache_hits", "Prompt tokens of the prefix cache that were read from disk.", "disk_hit_tokens"),
    ("num_overtakes", "Requests that went before others because of a cached prefix.", "overtakes"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", "prefix_queried_tokens"),
    ("forced_tokens", "Tokens without a step of their own, as a form left no choice about them.", "forced_tokens"),
    ("spec_decode_num_draft_tokens", "Tokens guessed ahead.", "draft_tokens"),
    ("spec_decode_num_accepted_tokens", "Tokens guessed ahead that were right.", "accepted_tokens"),
)

# What host memory behind the cache tells, too.
_OFFLOAD_GAUGES = (
    ("host_cache_bytes_in_use", "Prefixes and preempted sequences in host memory, in bytes.", "host_bytes_in_use"),
    ("host_cache_bytes_allocated", "Host memory taken for them, in bytes.", "host_bytes_allocated"),
)

# What a disk behind that tells, too.
_DISK_GAUGES = (
    ("disk_cache_bytes", "Prefixes in files of the folder, whosever, in bytes.", "disk_bytes"),
    ("disk_cache_files", "Files they are, one a block.", "disk_files"),
)

# What the policy "fair" tells, too.
_FAIR_GAUGES = (
    ("num_users", "Users with requests.", "users"),
    ("num_users_waiting", "Users with requests waiting.", "users_waiting"),
    ("user_service_gap_tokens", "How far apart those are by what they were served, in weighted tokens.", "service_gap"),
)


class Metrics:
    """What happens to the requests of one app, and what its engine says of itself. Each app has a registry of its own.

    Attributes:
        loop_lag: how late the event loop is; see `lag`.
    """

    def __init__(self, engine: AsyncEngine, model_name: str):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(engine, model_name))
        self._gaps = _Gaps(model_name)
        self.registry.register(self._gaps)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple) -> Histogram:
            made = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", LONG)
        self._each = histogram("request_time_per_output_token_seconds", "From token to token, a request's mean.", SHORT)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", LONG)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.", LONG)
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", LONG)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", LONG)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens generated for a prompt.", TOKENS)
        self._prompt_total = counter("prompt_tokens", "Tokens of prompts.").labels(model_name)
        self._generated_total = counter("generation_tokens", "Tokens generated.").labels(model_name)
        self._successes = counter("request_success", "Completions that came to their end.", "finished_reason")
        self._failures = counter("request_failure", "Prompts that ended with an error, or whose client left.", "code")
        self._errors = counter("errors", "HTTP requests that were answered with an error.", "code")
        self._http = counter("http_requests", "HTTP requests that ended.", "method", "handler", "status")
        self._http_seconds = Histogram(
            PREFIX + "http_request_duration_seconds",
            "From a request's headers to the last byte of its answer.",
            ["model_name", "handler"],
            buckets=LONG,
            registry=self.registry,
        )
        under_way = Gauge(PREFIX + "http_requests_open", "HTTP requests under way.", ["model_name"], registry=self.registry)
        self._open = under_way.labels(model_name)
        self.loop_lag = histogram("event_loop_lag_seconds", "How late the event loop is, looked at regularly.", LAG)
        self._model_name = model_name

    def begun(self) -> None:
        """An HTTP request has come."""
        self._open.inc()

    def answered(self, observation: Observation) -> None:
        """An HTTP request has ended."""
        self._open.dec()
        method = observation.method if observation.method in METHODS else "other"
        handler, status = observation.route or "none", str(observation.status or "none")
        self._http.labels(self._model_name, method, handler, status).inc()
        self._http_seconds.labels(self._model_name, handler).observe(observation.ended - observation.started)
        if observation.error is not None:
            self._errors.labels(self._model_name, observation.error).inc()

    async def watched(
        self, deltas: AsyncIterator[RequestDelta], params: SamplingParams | None = None, adapter: str | None = None
    ) -> AsyncIterator[RequestDelta]:
        """`deltas` of one prompt, counted on their way."""
        tokens, error, delta, before = 0, LEFT, None, None  # of whom nobody reads to the end
        reasons: list[str] = []
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    for completion in delta.outputs:
                        tokens += len(completion.token_ids)
                        if completion.finish_reason is not None:
                            reasons.append(completion.finish_reason)
                    now = time.monotonic()
                    if before is not None:
                        self._gaps.add(now - before)
                    before = now
                    if delta.finished:
                        error = None
                    yield delta
        except Exception as problem:
            error = describe(problem).code or "error"
            raise
        finally:
            self._ended(delta, tokens, error, reasons)
            if delta is not None and (observation := current()) is not None:
                observation.runs.append(
                    Run(
                        request_id=delta.request_id,
                        adapter=adapter,
                        params=params,
                        prompt_tokens=len(delta.prompt_token_ids),
                        completion_tokens=tokens,
                        times=delta.metrics,
                        finish_reasons=reasons,
                        error=error,
                    )
                )

    def _ended(self, delta: RequestDelta | None, tokens: int, error: str | None, reasons: list[str]) -> None:
        """A prompt has ended; `delta` is the last that was read of it."""
        if error is None:
            for reason in reasons:
                self._successes.labels(self._model_name, reason).inc()
            self._finished(delta, tokens)
        else:
            self._failures.labels(self._model_name, error).inc()
            if (observation := current()) is not None and observation.error is None:
                observation.error = error
        if delta is not None:
            self._prompt_total.inc(len(delta.prompt_token_ids))
            self._generated_total.inc(tokens)

    def _finished(self, delta: RequestDelta, tokens: int) -> None:
        times = delta.metrics
        end = times.finished or time.monotonic()
        self._prompt.observe(len(delta.prompt_token_ids))
        self._generated.observe(tokens)
        self._whole.observe(end - times.arrival)
        if times.first_scheduled is not None:
            self._queue.observe(times.first_scheduled - times.arrival)
        if times.first_token is not None:
            self._first.observe(times.first_token - times.arrival)
            self._prefill.observe(times.first_token - times.first_scheduled)
            self._decode.observe(end - times.first_token)
            if tokens > 1:
                self._each.observe((end - times.first_token) / (tokens - 1))


class _Gaps(Collector):
    """Times between two pieces of an answer, as its reader sees them.

    A histogram of its own, without locks: one event loop adds to it, for every token of every request.
    """

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._counts, self._sum = [0] * (len(SHORT) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SHORT, seconds)] += 1
        self._sum += seconds

    def describe(self):
        return []

    def collect(self):
        text = "From one piece of an answer to the next; a piece is a token, or what came while its reader was slow."
        family = HistogramMetricFamily(PREFIX + "inter_token_latency_seconds", text, labels=["model_name"])
        total, buckets = 0, []
        for bound, count in zip((*map(str, SHORT), "+Inf"), list(self._counts)):
            total += count
            buckets.append((bound, total))
        family.add_metric([self._model_name], buckets, self._sum)
        yield family


class _EngineNumbers(Collector):
    """The engine's counts, read when they are asked for."""

    def __init__(self, engine: AsyncEngine, model_name: str):
        self._engine, self._model_name = engine, model_name

    def describe(self):
        return []

    def collect(self):
        stats = self._engine.engine.stats()
        policy = self._engine.engine.config.policy
        gauges = _GAUGES + (_FAIR_GAUGES if policy == "fair" else ())
        offload = self._engine.engine.config.offload
        gauges += _OFFLOAD_GAUGES if offload is not None else ()
        gauges += _DISK_GAUGES if offload is not None and offload.disk is not None else ()
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, _COUNTERS)):
            for name, text, key in metrics:
                yield self._family(kind, name, text, stats[key])
        family = GaugeMetricFamily(PREFIX + "scheduling_policy", "Who runs first.", labels=["model_name", "policy"])
        family.add_metric([self._model_name, policy], 1)
        yield family
        share = stats["kv_bytes_in_use"] / stats["kv_bytes_limit"] if stats["kv_bytes_limit"] else 0.0
        yield self._family(GaugeMetricFamily, "kv_cache_usage_perc", "Share of the KV cache in use; 1 is all.", share)

    def _family(self, kind: type, name: str, text: str, value: float):
        family = kind(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


def router(metrics: Metrics) -> APIRouter:
    routes = APIRouter()

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        text = await asyncio.to_thread(generate_latest, metrics.registry)  # the engine may be in the middle of a step
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return routes
