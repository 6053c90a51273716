"""What runs beside the answers: ids of requests, logs, CORS, deadlines, bodies that take their time, apps inside apps."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import socket
import time

import httpx
import openai
import pytest
from fastapi import FastAPI
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import AsyncEngine, Engine, EngineConfig, InvalidArgument
from hf_paged.integrations.openai import Limits, Settings, create_app
from hf_paged.integrations.openai.logs import JsonFormatter, TextFormatter

KEY, SECRET = "a-key-to-keep", "what was asked"
LONG = {"model": MODEL, "prompt": "Tell me", "max_tokens": 400, "ignore_eos": True}


@contextlib.contextmanager
def logged(formatter):
    """Everything that this process logs meanwhile."""
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(formatter)
    loggers = [logging.getLogger(name) for name in ("hf_paged", "uvicorn", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield handler.stream
    finally:
        for logger, level in zip(loggers, levels):
            logger.removeHandler(handler)
            logger.setLevel(level)


def lines(stream: io.StringIO, count: int, logger: str = "hf_paged.access") -> list[dict]:
    """A line is written a moment after its client has the answer."""
    until = time.monotonic() + 10
    while True:
        found = [json.loads(line) for line in stream.getvalue().splitlines()]
        found = [line for line in found if line["logger"] == logger]
        if len(found) >= count or time.monotonic() > until:
            assert len(found) == count
            return found
        time.sleep(0.01)


@pytest.fixture(scope="module")
def guarded():
    settings = Settings(model_name=MODEL, api_keys=(KEY,), cors_origins=("https://example.org", "http://localhost:3000"))
    with serving(create_app(Engine(make_model(), make_tokenizer()), settings)) as url:
        yield url


def client_of(url: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, **options)


# Ids of requests


def test_the_client_knows_its_request_by_its_id(guarded):
    client = client_of(guarded)
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=2, extra_headers={"X-Request-Id": "mine:1"}
    )
    assert answer._request_id == "mine:1"
    made = [client.models.list()._request_id for _ in range(2)]
    assert len(set(made)) == 2 and all(re.fullmatch("[0-9a-f]{32}", name) for name in made)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=-1, extra_headers={"X-Request-Id": "mine:2"})
    assert caught.value.request_id == "mine:2"
    with client.completions.with_streaming_response.create(model=MODEL, prompt="a", stream=True) as response:
        assert re.fullmatch("[0-9a-f]{32}", response.request_id)


@pytest.mark.parametrize("path", ["/health", "/v1/nothing", "/v1/models", "/metrics"])
@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_every_answer_has_an_id(guarded, path, key):
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "of-mine"}
    assert httpx.get(guarded + path, headers=headers).headers.get_list("X-Request-Id") == ["of-mine"]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a,b", '"', "é".encode(), "a;b", "${jndi}"])
def test_an_id_that_is_not_plain_is_replaced(guarded, given):
    answer = httpx.get(f"{guarded}/health", headers={"X-Request-Id": given})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_one_id_for_many_requests_at_once_is_no_mistake(guarded):
    """Proxies and tracers give all requests of one visit the same."""
    client = client_of(guarded, default_headers={"X-Request-Id": "visit"})
    streams = [client.completions.create(model=MODEL, prompt="a", max_tokens=8, stream=True) for _ in range(3)]
    names = {chunk.id for stream in streams for chunk in stream}
    assert len(names) == 3


# Logs


def test_a_line_for_every_request_and_nothing_of_what_was_said(guarded):
    with logged(JsonFormatter()) as stream:
        client = client_of(guarded, default_headers={"X-Request-Id": "mine"})
        options = dict(model=MODEL, max_tokens=6, extra_body={"ignore_eos": True})
        chat = client.chat.completions.create(messages=[{"role": "user", "content": SECRET}], **options)
        streamed = list(client.completions.create(prompt=[SECRET, SECRET + "!"], stream=True, **options))
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=SECRET, stop=[SECRET] * 99)
        assert httpx.get(f"{guarded}/v1/models?{SECRET}", headers={"Authorization": "Bearer " + KEY[:-1]}).status_code == 401
        first, second, third, fourth = lines(stream, 4)
        text = stream.getvalue()
    assert first["request_id"] == "mine" and first["method"] == "POST" and first["path"] == "/v1/chat/completions"
    assert first["status"] == 200 and first["model"] == MODEL and first["ids"] == [chat.id]
    assert first["prompt_tokens"] == chat.usage.prompt_tokens and first["completion_tokens"] == 6
    assert 0 < first["ttft_s"] < first["duration_s"]
    assert second["completion_tokens"] == 12 and len(second["ids"]) == 2 and second["ids"][0].startswith(streamed[0].id)
    assert third["status"] == 400 and third["error"] == "too_many" and "ids" not in third
    assert fourth["status"] == 401 and fourth["error"] == "invalid_api_key" and fourth["path"] == "/v1/models"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert "client" not in first
    answers = [chat.choices[0].message.content, *(chunk.choices[0].text for chunk in streamed if chunk.choices)]
    for hidden in (SECRET, KEY, KEY[:-1], *(answer for answer in answers if len(answer) > 3)):
        assert hidden not in text


def test_a_failure_is_logged_with_its_place_and_without_its_words(monkeypatch):
    app = create_app(Engine(make_model(), make_tokenizer()), Settings(model_name=MODEL, log_client_address=True))
    service = app.state.service

    def broken(*_, **__):
        raise OSError(f"the disk says {SECRET}")

    with logged(JsonFormatter()) as stream, serving(app) as url:
        monkeypatch.setattr(service.tokenizer, "decode", broken)
        answer = httpx.post(f"{url}/detokenize", json={"tokens": [5]})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert answer.headers["X-Request-Id"] and SECRET not in answer.text
        monkeypatch.undo()
        assert httpx.get(f"{url}/v1/models").status_code == 200
        [failure] = [line for line in lines(stream, 2, "hf_paged.server") if line["level"] == "error"]
        asked = lines(stream, 2)[0]
    assert failure["exception"] == "OSError" and "in broken" in failure["stack"][-1]
    assert failure["request_id"] == answer.headers["X-Request-Id"] == asked["request_id"]
    assert asked["status"] == 500 and asked["error"] == "internal_error" and asked["client"] == "127.0.0.1"
    assert SECRET not in stream.getvalue()


def test_a_line_cannot_be_forged(guarded):
    with logged(TextFormatter()) as stream:
        httpx.get(f"{guarded}/v1/a%0A2026-01-01%20INFO%20hf_paged.access:%20forged", headers={"Authorization": f"Bearer {KEY}"})
        until = time.monotonic() + 10
        while "hf_paged.access" not in stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    [line] = [line for line in stream.getvalue().splitlines() if "forged" in line]
    assert " status=404 " in line and 'path="/v1/a\\n2026' in line


# CORS


@pytest.mark.parametrize("origin", ["https://example.org", "http://localhost:3000"])
def test_pages_that_are_named_may_ask(guarded, origin):
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = httpx.options(f"{guarded}/v1/chat/completions", headers=ask)
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == origin
    assert "authorization" in answer.headers["Access-Control-Allow-Headers"].lower()
    assert "Access-Control-Allow-Credentials" not in answer.headers
    refused = httpx.get(f"{guarded}/v1/models", headers={"Origin": origin})  # a page can read the error, too
    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == origin
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]


def test_other_pages_may_not(guarded, url):
    ask = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    for server in (guarded, url):  # the second allows none
        answer = httpx.options(f"{server}/v1/chat/completions", headers=ask)
        assert answer.status_code >= 400 and "Access-Control-Allow-Origin" not in answer.headers
        assert "Access-Control-Allow-Origin" not in httpx.get(f"{server}/health", headers=ask).headers
    for wrong in ("example.org", "https://example.org/", "https://example.org/page"):
        with pytest.raises(InvalidArgument, match="cors_origins"):
            Settings(cors_origins=(wrong,))


# Deadlines


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_s_own_timeout_ends_it(url, engine, stream):
    headers = {"X-Request-Timeout": "0.05"}
    slow = LONG | {"n": 8, "stream": stream, "logprobs": 5}
    answer = httpx.post(f"{url}/v1/completions", json=slow, headers=headers)
    if stream and answer.status_code == 200:
        last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "timeout" and "[DONE]" not in answer.text
    else:
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("given", ["soon", "0", "-1", "inf", "nan", ""])
def test_a_timeout_that_is_no_time_is_named(url, given):
    answer = httpx.post(f"{url}/v1/completions", json=LONG, headers={"X-Request-Timeout": given})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Request-Timeout"


# Bodies


@pytest.fixture(scope="module")
def impatient():
    settings = Settings(model_name=MODEL, body_timeout=0.3, limits=Limits(body_bytes=2000))
    with serving(create_app(Engine(make_model(), make_tokenizer()), settings)) as url:
        yield url


def raw(url: str, sent: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    return got


def test_a_body_that_does_not_come_ends_the_connection(impatient):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    answer = raw(impatient, head + b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body_too_slow" in answer
    assert httpx.post(f"{impatient}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_body_without_a_length_is_limited_too(impatient):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(impatient, head + b"7d0\r\n" + b" " * 2000 + b"\r\n1\r\n \r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"body_too_long" in answer


# Inside another app


def test_the_app_lives_in_somebody_else_s():
    """At a prefix, below their middleware, beside their routes, ended by their lifespan."""
    engine = AsyncEngine(Engine(make_model(), make_tokenizer(), EngineConfig(max_num_seqs=4)))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with engine:
            yield

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/llm", create_app(engine, Settings(model_name=MODEL, api_keys=(KEY,))))

    @outer.middleware("http")
    async def theirs(request, call_next):
        response = await call_next(request)
        response.headers["X-Theirs"] = "yes"
        return response

    @outer.get("/health")
    async def health():
        return {"theirs": True}

    with serving(outer) as url:
        assert httpx.get(f"{url}/health").json() == {"theirs": True}
        mine = httpx.get(f"{url}/llm/health")
        assert mine.status_code == 200 and mine.headers["X-Theirs"] == "yes" and mine.headers["X-Request-Id"]
        for path in ("/llm/v1/models", "/llm//health", "/llm/llm/health", "/llm/health/"):
            assert httpx.get(url + path).status_code == 401
        client = client_of(f"{url}/llm")
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=3).usage.completion_tokens > 0
        chunks = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
        assert list(chunks)[-1].choices[0].finish_reason
        assert httpx.get(f"{url}/llm/nothing", headers={"Authorization": f"Bearer {KEY}"}).json()["error"]["code"] == "not_found"
    assert engine.engine.closed
