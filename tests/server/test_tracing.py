"""OpenTelemetry traces of requests."""

from __future__ import annotations

import time

import httpx
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine, InvalidArgument
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.tracing import exporting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def traced(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = create_app(Engine(make_model(), make_tokenizer()), Settings(model_name=MODEL), tracer_provider=provider)
    with serving(app) as url:
        yield url


def finished(spans, count: int) -> dict:
    """Spans by name: the last of a request is ended a moment after its client has the answer."""
    until = time.monotonic() + 10
    while len(spans.get_finished_spans()) < count and time.monotonic() < until:
        time.sleep(0.01)
    found = {span.name: span for span in spans.get_finished_spans()}
    assert len(found) == count == len(spans.get_finished_spans())
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_trace_that_goes_on_with_its_client_s(traced, spans, stream):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine-1"}
    client = openai.OpenAI(base_url=f"{traced}/v1", api_key="none", max_retries=0, default_headers=headers)
    options = dict(model=MODEL, messages=[{"role": "user", "content": "the secret"}], max_tokens=5, temperature=0.5, seed=3)
    before = time.time_ns()
    answer = client.chat.completions.create(**options, stream=stream, extra_body={"ignore_eos": True})
    if stream:
        list(answer)
    found = finished(spans, 5)
    after = time.time_ns()
    http, chat = found["POST /v1/chat/completions"], found[f"chat {MODEL}"]
    assert f"{http.context.trace_id:032x}" == TRACE and f"{http.parent.span_id:016x}" == PARENT
    assert http.attributes["http.response.status_code"] == 200 and http.attributes["http.route"] == "/v1/chat/completions"
    assert http.attributes["hf_paged.request_id"] == "mine-1"
    assert chat.parent.span_id == http.context.span_id
    told = chat.attributes
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.request.model"] == MODEL
    assert told["gen_ai.request.temperature"] == 0.5 and told["gen_ai.request.max_tokens"] == 5
    assert told["gen_ai.usage.output_tokens"] == 5 and told["gen_ai.usage.input_tokens"] > 5
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent.span_id == chat.context.span_id for part in parts)
    times = [http.start_time, chat.start_time, *(part.start_time for part in parts), chat.end_time, http.end_time]
    assert before - 10**6 < times[0] and times == sorted(times) and times[-1] < after + 10**6  # clocks of their own
    assert [part.end_time for part in parts] == [parts[1].start_time, parts[2].start_time, chat.end_time]
    assert "secret" not in "".join(span.to_json() for span in found.values())


def test_errors_are_told_and_probes_are_not(traced, spans):
    assert httpx.get(f"{traced}/health").status_code == httpx.get(f"{traced}/metrics").status_code == 200
    assert httpx.post(f"{traced}/v1/completions", json={"prompt": "x" * 5000}).status_code == 400
    [span] = finished(spans, 1).values()
    assert span.attributes["error.type"] == "context_length_exceeded" and span.parent is None


def test_a_collector_s_address_is_checked():
    with pytest.raises(InvalidArgument, match="otlp_endpoint"):
        exporting("localhost:4318")
    exporting("http://localhost:4318").shutdown()
