"""OpenTelemetry traces: a span for every request, below it one for each prompt, with its time in the queue, in the prompt
and in the answer. Spans are made when a request has ended, from the times that the engine kept, so that nothing waits for
them. Needs `pip install hf_paged[otel]`.

Names follow OpenTelemetry's semantic conventions for HTTP servers and generative AI. No prompts, no answers.
"""

from __future__ import annotations

import time

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ...base.errors import InvalidArgument
from .observation import Observation, Run

# What GenAI's conventions call the operations. Other routes of the engine have a span of HTTP only.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
UNTRACED = frozenset({"/health", "/ping", "/metrics"})  # asked all the time, by machines
_PARAMS = ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")


def exporting(endpoint: str) -> TracerProvider:
    """A provider that sends spans to a collector, in the background. `endpoint` is its address for OTLP over HTTP."""
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidArgument(f"otlp_endpoint must be an address such as http://localhost:4318, got {endpoint!r}")
    path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
    provider = TracerProvider(resource=Resource.create({"service.name": "hf_paged"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + path)))
    return provider


class Tracing:
    """Makes the spans of one app's requests.

    Args:
        provider: OpenTelemetry's TracerProvider.
    """

    def __init__(self, provider, model_name: str):
        self._tracer = provider.get_tracer("hf_paged")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def record(self, observation: Observation) -> None:
        """A request has ended."""
        if observation.route in UNTRACED:
            return
        offset = time.time_ns() - time.monotonic_ns()

        def clock(seconds: float) -> int:
            return int(seconds * 1e9) + offset

        route = observation.route
        span = self._tracer.start_span(
            f"{observation.method} {route}" if route else observation.method,
            context=self._parent(observation),
            kind=SpanKind.SERVER,
            start_time=clock(observation.started),
            attributes={
                "http.request.method": observation.method,
                "url.path": observation.path,
                "hf_paged.request_id": observation.request_id,
            },
        )
        if route is not None:
            span.set_attribute("http.route", route)
        if observation.status is not None:
            span.set_attribute("http.response.status_code", observation.status)
        if observation.error is not None:
            span.set_attribute("error.type", observation.error)
            if (observation.status or 500) >= 500:
                span.set_status(Status(StatusCode.ERROR))
        for run in observation.runs:
            self._run(span, observation, run, clock)
        span.end(clock(observation.ended))

    def _parent(self, observation: Observation) -> context.Context:
        """What the app around this one has begun, else what the client says of itself."""
        around = context.get_current()
        if trace.get_current_span(around).get_span_context().is_valid:
            return around
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in observation.headers}
        return self._propagator.extract(headers, around)

    def _run(self, parent: Span, observation: Observation, run: Run, clock) -> None:
        operation = OPERATIONS.get(observation.route)
        if operation is None:
            return
        times, model = run.times, run.adapter or self._model_name
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "hf_paged",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": run.request_id,
            "gen_ai.usage.input_tokens": run.prompt_tokens,
            "gen_ai.usage.output_tokens": run.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": times.num_cached_tokens,
            "hf_paged.num_preemptions": times.num_preemptions,
        }
        if run.finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = run.finish_reasons
        if run.params is not None:
            values = {f"gen_ai.request.{name}": getattr(run.params, name) for name in _PARAMS}
            values["gen_ai.request.choice.count"] = run.params.n if run.params.n != 1 else None
            attributes |= {name: value for name, value in values.items() if value is not None}
        ended = times.finished if times.finished is not None else observation.ended
        inside = trace.set_span_in_context(parent)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=inside,
            kind=SpanKind.INTERNAL,
            start_time=clock(times.arrival),
            attributes=attributes,
        )
        if run.error is not None:
            span.set_attribute("error.type", run.error)
            span.set_status(Status(StatusCode.ERROR))
        marks = [times.arrival, times.first_scheduled, times.first_token, ended]
        for name, start, end in zip(("queue", "prefill", "decode"), marks, marks[1:]):
            if start is None:
                break
            part = self._tracer.start_span(name, context=trace.set_span_in_context(span), start_time=clock(start))
            part.end(clock(ended if end is None else end))
        span.end(clock(ended))
