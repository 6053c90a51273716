"""The page to chat with: what is sent, to whom, and that it asks only its own server. See page_browser.py, too."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re

import httpx
import pytest
from fastapi import FastAPI
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import AsyncEngine, Engine
from hf_paged.integrations.openai import Settings, create_app


@pytest.fixture(scope="module")
def urls():
    """Addresses of one engine's apps: mounted with keys, and mounted without a page."""
    host = FastAPI()
    engine = AsyncEngine(Engine(make_model(), make_tokenizer()))
    host.mount("/llm", create_app(engine, Settings(model_name=MODEL, api_keys=("key",))))
    host.mount("/bare", create_app(engine, Settings(model_name=MODEL, page=False)))
    with serving(host) as url:
        yield url
    asyncio.run(engine.close())


def test_the_page_is_sent_once(url):
    first = httpx.get(f"{url}/")
    assert first.status_code == 200 and first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.text.startswith("<!doctype html>")
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = httpx.get(f"{url}/", headers={"If-None-Match": known})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == first.headers["etag"]
    assert httpx.get(f"{url}/", headers={"If-None-Match": '"older"'}).text == first.text
    head = httpx.head(f"{url}/")
    assert head.status_code == 200 and int(head.headers["content-length"]) == len(first.content) and not head.content


def test_nothing_else_may_run_on_the_page(url):
    answer = httpx.get(f"{url}/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["require-trusted-types-for"] == "'script'"
    for element in ("script", "style"):
        [text] = re.findall(rf"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"\s(style|on[a-z]+)=", answer.text), "attributes that the policy forbids"


def test_the_page_asks_nobody_else(url):
    text = httpx.get(f"{url}/").text.replace("xmlns='http://www.w3.org/2000/svg'", "")
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}|<link[^>]+href=\"(?!data:)|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)


def test_below_a_prefix_and_without_a_key_only_the_page_is_there(urls):
    page = httpx.get(f"{urls}/llm/")
    assert page.status_code == 200 and "v1/chat/completions" in page.text and '"/v1' not in page.text
    assert httpx.get(f"{urls}/llm/health").status_code == 200
    for path in ("/v1/models", "//", "/page.html", "/openapi.json", "/metrics"):
        assert httpx.get(f"{urls}/llm{path}").status_code == 401
    assert httpx.post(f"{urls}/llm/").status_code == 405
    assert httpx.get(f"{urls}/llm/v1/models", headers={"Authorization": "Bearer key"}).status_code == 200


def test_the_page_can_be_turned_off(urls):
    assert httpx.get(f"{urls}/bare/").status_code == 404
    assert httpx.get(f"{urls}/bare/v1/models").status_code == 200
