"""LangChain's own OpenAI classes as clients of the server: what they get is what the engine gives."""

from __future__ import annotations

import asyncio

import numpy
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from server_parts import MODEL, serving
from tool_parts import make_engine

from hf_paged import SamplingParams
from hf_paged.integrations.openai import Settings, create_app

CHAT = [SystemMessage("Be brief."), HumanMessage("Name a river."), AIMessage("Rhine."), HumanMessage("Another.")]


@tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def address(engine):
    with serving(create_app(engine, Settings(model_name=MODEL, tool_parser="hermes"))) as url:
        yield {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}


@pytest.fixture(scope="module")
def chat(address):
    return ChatOpenAI(model=MODEL, temperature=0, max_tokens=12, **address)


def expected(engine, messages: list[dict]) -> str:
    async def ask():
        return await engine.complete(messages, SamplingParams(temperature=0, max_tokens=12))

    return asyncio.run(ask()).outputs[0].text


def test_chat_and_stream(engine, chat):
    roles = [("system", "Be brief."), ("user", "Name a river."), ("assistant", "Rhine."), ("user", "Another.")]
    wanted = expected(engine, [{"role": role, "content": text} for role, text in roles])
    answer = chat.invoke(CHAT)
    assert answer.content == wanted
    assert answer.usage_metadata["output_tokens"] == 12 and answer.response_metadata["finish_reason"] == "length"
    pieces = list(chat.stream(CHAT))
    assert "".join(piece.content for piece in pieces) == wanted and len(pieces) > 3
    assert [one.content for one in chat.batch([CHAT, "Another."])][0] == wanted


def test_async_chat(engine, address):
    async def ask() -> tuple[str, str]:
        chat = ChatOpenAI(model=MODEL, temperature=0, max_tokens=12, **address)
        whole = await chat.ainvoke("Name a river.")
        return whole.content, "".join([piece.content async for piece in chat.astream("Name a river.")])

    wanted = expected(engine, [{"role": "user", "content": "Name a river."}])
    assert asyncio.run(ask()) == (wanted, wanted)


def test_tools(engine, address, chat):
    caller = ChatOpenAI(model=MODEL, temperature=0, max_tokens=200, **address).bind_tools(
        [weather], tool_choice="weather"
    )
    engine.script = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    try:
        answer = caller.invoke("Weather?")
        pieces = list(caller.stream("Weather?"))
    finally:
        engine.script = None
    (call,) = answer.tool_calls
    assert call["name"] == "weather" and call["args"] == {"city": "Oslo"}
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert [one["args"] for one in whole.tool_calls] == [{"city": "Oslo"}]
    said = weather.invoke(call)
    assert isinstance(said, ToolMessage) and said.content == "rain in Oslo"
    assert isinstance(chat.invoke([HumanMessage("Weather?"), answer, said]).content, str)


def test_embeddings(engine, address):
    texts = ["the river Rhine", "Lake Constance", "snow"]
    vectors = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **address)
    wanted = [output.embedding for output in asyncio.run(engine.embed(texts))]
    numpy.testing.assert_allclose(vectors.embed_documents(texts), wanted, atol=1e-6)
    numpy.testing.assert_allclose(vectors.embed_query(texts[0]), wanted[0], atol=1e-6)
