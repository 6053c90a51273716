"""Who may ask, and what is counted."""

from __future__ import annotations

import http.client

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import AsyncEngine, Engine, InvalidArgument
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.auth import read_keys

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded():
    app = create_app(Engine(make_model(), make_tokenizer()), Settings(model_name=MODEL, api_keys=KEYS))
    with serving(app) as url:
        yield url


def numbers(url: str, **headers) -> dict[tuple, float]:
    """(name, its labels but the model) -> value."""
    text = httpx.get(f"{url}/metrics", headers=headers).raise_for_status().text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            assert sample.labels["model_name"] == MODEL
            found[sample.name.removeprefix("hf_paged:"), labels] = sample.value
    return found


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens_the_server(guarded, key):
    client = openai.OpenAI(base_url=f"{guarded}/v1", api_key=key, max_retries=0)
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens > 0


@pytest.mark.parametrize("key", ["", "wrong", "first-key ", "first", "first-key,second-key", "FIRST-KEY"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/tokenize", "/docs", "/openapi.json", "//", "//health", "/health/", "/v1/../health"])
def test_without_a_key_nothing_is_told(guarded, key, path):
    """Sent as it is written: clients that tidy paths up would test nothing."""
    connection = http.client.HTTPConnection(guarded.removeprefix("http://"))
    headers = {"Authorization": f"Bearer {key.strip()}" if key != "first-key " else "Basic first-key"}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert b"invalid_api_key" in answer.read()
    connection.close()


def test_load_balancers_need_no_key(guarded):
    assert httpx.get(f"{guarded}/health").status_code == httpx.get(f"{guarded}/ping").status_code == 200


def test_two_headers_are_no_key(guarded):
    headers = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEYS[0]}")]
    assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 401


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\nfrom-both\n")
    monkeypatch.setenv("HF_PAGED_API_KEYS", "from-environment, from-both")
    assert read_keys(["given"], file) == ("given", "from-file", "from-both", "from-environment")
    file.write_text("# none\n")
    with pytest.raises(InvalidArgument, match="holds no keys"):
        read_keys([], file)
    for wrong in (("",), ("a b",), ("é",), "key"):
        with pytest.raises(InvalidArgument, match="api_keys"):
            Settings(api_keys=wrong)


def test_requests_are_counted(url, engine):
    before = numbers(url)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model=MODEL, prompt="Tell me", max_tokens=7, extra_body={"ignore_eos": True})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x" * 5000, max_tokens=3)
    stream = client.completions.create(model=MODEL, prompt="b", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    while engine.has_unfinished():
        pass
    after = numbers(url)

    def grown(name: str, **labels) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    path = "/v1/completions"
    assert grown("request_success_total", finished_reason="length") == 1
    assert grown("request_failure_total", code="context_length_exceeded") == 1
    assert grown("request_failure_total", code="client_closed_request") == 1
    assert grown("http_requests_total", method="POST", handler=path, status="400") == 1
    assert grown("http_requests_total", method="POST", handler=path, status="200") == 2
    assert grown("http_request_duration_seconds_count", handler=path) == 3
    assert grown("errors_total", code="context_length_exceeded") == 1
    assert grown("request_prompt_tokens_sum") == answer.usage.prompt_tokens
    assert grown("request_generation_tokens_sum") == 7
    assert grown("generation_tokens_total") > 7  # of the answer that was left, too
    for name in ("time_to_first_token", "request_time_per_output_token", "e2e_request_latency", "request_queue_time"):
        assert grown(f"{name}_seconds_count") == 1 and grown(f"{name}_seconds_sum") > 0
    whole = grown("e2e_request_latency_seconds_sum")
    parts = [grown(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(whole)
    assert 1 <= grown("inter_token_latency_seconds_count") == grown("inter_token_latency_seconds_bucket", le="+Inf")
    assert grown("steps_total") >= 7
    idle = ("num_requests_running", "num_requests_waiting", "kv_cache_bytes_in_use", "kv_cache_usage_perc")
    assert all(after[name, ()] == 0 for name in idle)


def test_an_engine_of_the_caller_s_stays_open():
    async def main():
        async with AsyncEngine(Engine(make_model(), make_tokenizer())) as engine:
            app = create_app(engine, Settings(model_name=MODEL))
            async with app.router.lifespan_context(app):
                assert engine.running
            assert engine.running and not engine.engine.closed

    import asyncio

    asyncio.run(main())
    with pytest.raises(InvalidArgument, match="engine must be"):
        create_app(make_model())
    with Engine(make_model()) as engine, pytest.raises(InvalidArgument, match="tokenizer"):
        create_app(engine)
