"""What LlamaIndex's OpenAILike and OpenAILikeEmbedding send, answered as they read it.

The requests in llama_index_requests.json are as those classes sent them (llama-index-core 0.14.25, llms-openai-like 0.8.1,
embeddings-openai-like 0.4.0): they would bring seventy packages for a few requests.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import httpx
import numpy
import pytest
from server_parts import MODEL, serving
from tool_parts import make_engine

from hf_paged import SamplingParams
from hf_paged.integrations.openai import Settings, create_app

SENT = {one["call"]: one for one in json.loads(Path(__file__).with_name("llama_index_requests.json").read_text())}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CITY = {"city": "Oslo", "days": 3}


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def client(engine):
    with serving(create_app(engine, Settings(model_name=MODEL, tool_parser="hermes"))) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


@pytest.fixture
def script(engine):
    """Let the model write this."""
    yield lambda text: setattr(engine, "script", text)
    engine.script = None


def answer(client, call: str) -> dict | list[dict]:
    """The body of the answer, or of a stream its chunks."""
    sent = SENT[call]
    response = client.post(sent["path"], json=sent["body"])
    assert response.status_code == 200, response.text
    if not sent["body"].get("stream"):
        return response.json()
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def expected(engine, prompt, **options) -> str:
    params = SamplingParams(temperature=0, max_tokens=12, **options)
    return asyncio.run(engine.complete(prompt, params)).outputs[0].text


def test_completions(engine, client):
    wanted = expected(engine, "Name a river.")
    assert answer(client, "complete")["choices"][0]["text"] == wanted
    assert "".join(chunk["choices"][0]["text"] for chunk in answer(client, "stream_complete")) == wanted
    told = answer(client, "complete with logprobs")["choices"][0]["logprobs"]
    assert len(told["tokens"]) == 12 and all(1 <= len(top) <= 3 for top in told["top_logprobs"])


def test_chat(engine, client):
    wanted = expected(engine, SENT["chat"]["body"]["messages"])
    body = answer(client, "chat")
    assert body["choices"][0]["message"]["content"] == wanted and body["usage"]["completion_tokens"] == 12
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer(client, "stream_chat")) == wanted
    told = answer(client, "chat with logprobs")["choices"][0]["logprobs"]["content"]
    assert len(told) == 12 and all(len(one["top_logprobs"]) == 3 for one in told)
    stopped = answer(client, "additional_kwargs")["choices"][0]["message"]["content"]
    assert stopped == wanted.partition("e")[0] != wanted


@pytest.mark.parametrize("call", ["chat_with_tools", "chat_with_tools, tool_required"])
def test_tools(client, script, call):
    script(CALL)
    choice = answer(client, call)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (called,) = choice["message"]["tool_calls"]
    assert called["function"]["name"] == "weather" and json.loads(called["function"]["arguments"]) == {"city": "Oslo"}


@pytest.mark.parametrize("call", ["stream_chat_with_tools", "FunctionAgent"])
def test_streamed_tools(client, script, call):
    script(CALL)
    parts = [part for chunk in answer(client, call) for part in chunk["choices"][0]["delta"].get("tool_calls") or ()]
    assert parts[0]["function"]["name"] == "weather" and {part["index"] for part in parts} == {0}
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"city": "Oslo"}


def test_after_a_tool(engine, client):
    assert isinstance(answer(client, "chat after a tool")["choices"][0]["message"]["content"], str)
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in answer(client, "FunctionAgent after a tool")]
    assert any(pieces)


def test_structured(client, script):
    script(f'<tool_call>\n{{"name": "City", "arguments": {json.dumps(CITY)}}}\n</tool_call>')
    (called,) = answer(client, "as_structured_llm by tools")["choices"][0]["message"]["tool_calls"]
    assert json.loads(called["function"]["arguments"]) == CITY
    script(json.dumps(CITY))
    assert json.loads(answer(client, "as_structured_llm by schema")["choices"][0]["message"]["content"]) == CITY
    pieces = answer(client, "as_structured_llm by schema, streamed")
    assert json.loads("".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)) == CITY


def test_embeddings(engine, client):
    def vectors(call: str) -> list[numpy.ndarray]:
        return [numpy.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer(client, call)["data"]]

    texts = SENT["get_text_embedding_batch"]["body"]["input"]
    wanted = [output.embedding for output in asyncio.run(engine.embed(texts))]
    numpy.testing.assert_allclose(vectors("get_text_embedding_batch"), wanted, atol=1e-6)
    assert [len(vector) for vector in vectors("dimensions")] == [8]
