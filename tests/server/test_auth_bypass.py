"""Ways around the keys: odd paths, headers, methods, upgrades, prefixes. Sent as they are written, byte for byte."""

from __future__ import annotations

import contextlib
import socket

import httpx
import pytest
from fastapi import FastAPI
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import AsyncEngine, Engine
from hf_paged.integrations.openai import Settings, create_app

KEY = "the-key"
MINE = MODEL.encode()  # the model's name is told to nobody without a key
PATHS = (
    *("//v1/models", "/v1//models", "/./v1/models", "/v1/../v1/models", "/health/../v1/models", "/v1/models/../../health"),
    *("/%68ealth/../v1/models", "/health%2f..%2fv1%2fmodels", "/health%2F../v1/models", "/%2e%2e/v1/models", "/v1%2fmodels"),
    *("/health;/v1/models", "/health/v1/models", "/health?/v1/models/../", "/health%00", "/health%20", "/health%0d%0a", "/HEALTH"),
    *("/v1/models?x=/health", "/v1/models#/health", "/v1/models/health", "/ping/../metrics", "/metrics/", "/docs", "/openapi.json"),
    *("http://127.0.0.1/v1/models", "http://x/health/../v1/models", "http://health/v1/models", "*", "/v1/models\\..\\health"),
)


@pytest.fixture(scope="module")
def guarded():
    settings = Settings(model_name=MODEL, api_keys=(KEY,), cors_origins=("https://example.org",))
    with serving(create_app(Engine(make_model(), make_tokenizer()), settings)) as url:
        yield url


@pytest.fixture(scope="module")
def mounted():
    engine = AsyncEngine(Engine(make_model(), make_tokenizer()))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with engine:
            yield

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/health", create_app(engine, Settings(model_name=MODEL, api_keys=(KEY,))))
    with serving(outer) as url:
        yield url


def asked(url: str, head: str, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and all bytes of the answer to a request of these very lines."""
    host, port = url.removeprefix("http://").split(":")
    sent = "\r\n".join((head, *lines, "Connection: close", f"Content-Length: {len(body)}", "", "")).encode("latin-1")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent + body)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    return int(got.split()[1]), got


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_around_the_keys(guarded, path):
    status, got = asked(guarded, f"GET {path} HTTP/1.1", "Host: x")
    told_alive = path.partition("?")[0] == "/health" and status == 200  # what it asks is the open path itself
    assert status in (400, 401) or told_alive
    assert MINE not in got.partition(b"\r\n\r\n")[2] and b"hf_paged:" not in got


@pytest.mark.parametrize("path", ["/v1/models", "//v1/models", "/v1/models/..", "/metrics", "/health/v1/models", "/../health/v1/models"])
def test_nor_where_the_app_is_mounted(mounted, path):
    """Below a prefix that is itself called like an open path."""
    status, got = asked(mounted, f"GET /health{path} HTTP/1.1", "Host: x")
    assert status == 401 and b"invalid_api_key" in got
    assert httpx.get(f"{mounted}/health/health").status_code == httpx.get(f"{mounted}/health/ping").status_code == 200
    answer = httpx.get(f"{mounted}/health/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.json()["data"][0]["id"] == MODEL


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_no_method_does(guarded, method):
    status, _ = asked(guarded, f"{method} /v1/chat/completions HTTP/1.1", "Host: x")
    assert status == 401


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: x/health", "X-Original-URL: /health", "X-Rewrite-URL: /health"),
        ("Host: 127.0.0.1/health?",),
        ("Host: x", "X-HTTP-Method-Override: OPTIONS"),
        ("Host: x", "X-Forwarded-Prefix: /v1/models", "X-Forwarded-Path: /health", "X-Script-Name: /v1"),
        ("Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"),
        ("Host: x", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
        ("Host: x", "Authorization: Bearer"),
        ("Host: x", "Authorization: Bearer null"),
        ("Host: x", "Authorization: the-key"),
        ("Host: x", "Authorization: Basic dGhlLWtleTo="),
        ("Host: x", "Authorization: Bearer wrong, Bearer the-key"),
        ("Host: x", "Authorization: Bearer wrong", "Authorization: Bearer the-key"),
        ("Host: x", "X-Api-Key: the-key", "Api-Key: the-key"),
        ("Host: x", "Cookie: Authorization=Bearer the-key"),
    ],
    ids=str,
)
def test_no_header_does(guarded, lines):
    status, got = asked(guarded, "GET /v1/models?api_key=the-key HTTP/1.1", *lines)
    assert status in (400, 401) and MINE not in got.partition(b"\r\n\r\n")[2]


def test_a_preflight_needs_no_key_and_tells_nothing(guarded):
    lines = ("Host: x", "Origin: https://example.org", "Access-Control-Request-Method: POST")
    status, got = asked(guarded, "OPTIONS /v1/chat/completions HTTP/1.1", *lines)
    assert status == 200 and got.endswith(b"\r\n\r\nOK")
    real = ("Host: x", "Origin: https://example.org", "Content-Type: application/json")
    status, got = asked(guarded, "POST /v1/completions HTTP/1.1", *real, body=b'{"prompt": "a"}')
    assert status == 401


def test_a_second_request_on_the_connection_needs_a_key_again(guarded):
    host, port = guarded.removeprefix("http://").split(":")
    first = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    second = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall((first + second).encode())
        got = b""
        while piece := connection.recv(65536):
            got += piece
    assert got.startswith(b"HTTP/1.1 200 ") and got.count(b"HTTP/1.1 401 ") == 1 and got.count(MINE) >= 1


def test_a_body_smuggled_behind_another_is_refused(guarded):
    """Two ways to tell a body's length, of which a proxy might take the other."""
    lines = ("Host: x", f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked")
    inner = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    _, got = asked(guarded, "POST /v1/completions HTTP/1.1", *lines, body=inner)
    assert MINE not in got.partition(b"\r\n\r\n")[2]


def test_websockets_of_other_servers_are_closed():
    """Under a server that takes upgrades, every one without a key ends before it begins."""
    import asyncio

    app = create_app(Engine(make_model(), make_tokenizer()), Settings(model_name=MODEL, api_keys=(KEY,)))
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "raw_path": b"/health", "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    asyncio.run(app.state.service.engine.close())
