"""/v1/responses through the real client: the answers of chat completions, as items and events, kept for later turns."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Literal

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel
from server_parts import MODEL
from tool_parts import ADD, SCHEMAS, client_of, make_engine

from hf_paged.integrations.openai import Limits

TOOLS = [{"type": "function", "name": name, "parameters": schema} for name, schema in SCHEMAS.items()]
BASE = dict(model=MODEL, input="Weather?", temperature=0)
THOUGHTS = "<think>Let me see.</think>It rains."
CALLS = (
    'Wait.<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "exact": true}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(autouse=True)
def no_script(engine):
    yield
    engine.script = engine.beginning = None
    until = time.monotonic() + 10
    while engine.engine.has_unfinished() and time.monotonic() < until:
        time.sleep(0.01)
    assert not engine.engine.has_unfinished()


@pytest.fixture(scope="module")
def client(engine):
    with client_of(engine, tool_parser="hermes", reasoning_parser="think", limits=Limits(messages=16)) as client:
        yield client


def same(one: Response, other: Response) -> bool:
    """But for names and times."""
    return plain(one) == plain(other)


def plain(value):
    if isinstance(value, Response):
        value = value.model_dump()
    if isinstance(value, dict):
        changing = {"id", "call_id", "created_at", "completed_at", "usage", "background"}
        return {key: plain(part) for key, part in value.items() if key not in changing}
    return [plain(part) for part in value] if isinstance(value, list) else value


def test_it_says_what_chat_completions_say(client):
    response = client.responses.create(**BASE, instructions="Be brief.", max_output_tokens=12, user="me", metadata={"a": "b"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert response.output_text == answer.choices[0].message.content and response.output_text
    assert response.status == ("incomplete" if answer.choices[0].finish_reason == "length" else "completed")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (answer.usage.prompt_tokens, 12)
    assert response.usage.total_tokens == answer.usage.total_tokens
    assert (response.instructions, response.user, response.metadata) == ("Be brief.", "me", {"a": "b"})
    Response.model_validate(response.model_dump(exclude_unset=True))  # the client itself does not look


def test_the_same_items_in_all_their_forms(client):
    texts = [client.responses.create(**BASE | {"input": given}, max_output_tokens=6).output_text for given in (
        "Weather?",
        [{"role": "user", "content": "Weather?"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": part} for part in ("Weat", "her?")]}],
    )]  # fmt: skip
    assert len(set(texts)) == 1


SCRIPTS = {"thoughts": THOUGHTS, "calls": CALLS, "both": "<think>Hm.</think>" + CALLS, "nothing": "", "its own": None}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_events_add_up_to_the_response(engine, client, script):
    engine.script = script
    options = BASE | dict(tools=TOOLS, max_output_tokens=40 if script is None else 400)
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert not events[0].response.output and events[-1].type == f"response.{whole.status}"
    assert same(events[-1].response, whole)
    items = []
    for event in events[2:-1]:
        kind = event.type.removeprefix("response.")
        if kind == "output_item.added":
            assert event.output_index == len(items) and event.item.status == "in_progress"
            items.append({"id": event.item.id, "text": "", "open": True})
            continue
        item = items[event.output_index]
        assert item["open"] and item["id"] == (event.item.id if kind == "output_item.done" else event.item_id)
        if kind.endswith(".delta"):
            item["text"] += event.delta
        elif kind == "content_part.added":
            assert event.part.text == "" and not item["text"]
        elif kind == "content_part.done":
            assert event.part.text == item["text"]
        elif kind == "output_item.done":
            item["open"] = False
            assert plain(event.item.model_dump()) == plain(whole.output[event.output_index].model_dump())
        else:
            assert (event.arguments if "arguments" in kind else event.text) == item["text"]
    assert len(items) == len(whole.output) and not any(item["open"] for item in items)


def test_reasoning_and_calls_are_items(engine, client):
    engine.script = "<think>Hm.</think>" + CALLS
    response = client.responses.create(**BASE, tools=TOOLS, max_output_tokens=400)
    thought, said, *calls = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert (said.type, said.content[0].text) == ("message", "Wait.")
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("add", {"a": 1, "exact": True}),
    ]
    assert response.status == "completed" and response.usage.output_tokens_details.reasoning_tokens > 0


def test_results_of_calls_go_back(engine, client):
    """Output items are given back as they are, with the function's result: the model reads what a chat would give it."""
    engine.script = "<think>Hm.</think>" + CALLS.split("<tool_call>\n{\"name\": \"add\"")[0]
    first = client.responses.create(**BASE, tools=TOOLS, max_output_tokens=400)
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    engine.script = None
    options = dict(model=MODEL, tools=TOOLS, temperature=0, max_output_tokens=10)
    by_items = client.responses.create(**options, input=[{"role": "user", "content": "Weather?"}, *first.output, result])
    by_id = client.responses.create(**options, input=[result], previous_response_id=first.id)
    function = {"name": "get_weather", "arguments": call.arguments}
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
    ]
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
    chat = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, temperature=0, max_tokens=10)
    assert by_items.output_text == by_id.output_text == chat.choices[0].message.content
    assert by_id.usage.input_tokens == by_items.usage.input_tokens == chat.usage.prompt_tokens
    assert by_id.usage.input_tokens_details.cached_tokens >= by_id.usage.input_tokens // 2
    items = client.responses.input_items.list(by_id.id, order="asc", limit=2)
    assert [item.type for item in items] == ["message", "reasoning", "message", "function_call", "function_call_output"]


def test_forms_of_answers(client):
    class Sum(BaseModel):
        exact: bool
        also: Literal["this", "that"]

    drawn = BASE | dict(temperature=1, extra_body={"seed": 3})  # the likeliest white space never ends
    parsed = client.responses.parse(**drawn, text_format=Sum, max_output_tokens=600)
    assert isinstance(parsed.output_parsed, Sum) and parsed.text.format.type == "json_schema"
    answer = client.responses.create(**drawn, text={"format": {"type": "json_object"}}, max_output_tokens=5)
    assert answer.output_text.lstrip().startswith("{")
    called = client.responses.create(**BASE, tools=TOOLS, tool_choice="required", max_output_tokens=300)
    assert called.output[-1].type == "function_call"
    named = client.responses.create(
        **BASE, tools=TOOLS, tool_choice={"type": "function", "name": "add"}, max_output_tokens=300
    )
    [call] = [item for item in named.output if item.type == "function_call"]
    assert call.name == "add" and set(json.loads(call.arguments)) == set(ADD["required"])


def test_the_clients_own_stream(engine, client):
    engine.script = THOUGHTS
    with client.responses.stream(**BASE, max_output_tokens=100) as stream:
        told = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert told == stream.get_final_response().output_text == "It rains."


def test_log_probabilities(engine, client):
    engine.script = THOUGHTS
    options = BASE | dict(include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=100)
    part = client.responses.create(**options).output[-1].content[0]
    assert len(part.logprobs[0].top_logprobs) == 2
    assert "".join(entry.token for entry in part.logprobs) == "It rains.</s>"
    deltas = [event for event in client.responses.create(**options, stream=True) if event.type == "response.output_text.delta"]
    told = [entry.logprob for event in deltas for entry in event.logprobs]
    assert told == [entry.logprob for entry in part.logprobs[: len(told)]] and len(told) >= len(part.logprobs) - 1


def test_kept_until_deleted(client):
    response = client.responses.create(**BASE, max_output_tokens=4)
    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    gone = client.responses.create(**BASE, max_output_tokens=4, store=False)
    for name in (response.id, gone.id, "resp_none"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(**BASE, previous_response_id=gone.id)


def test_in_the_background(engine, client):
    queued = client.responses.create(**BASE, background=True, max_output_tokens=12)
    assert queued.status in ("queued", "in_progress") and not queued.output
    response = queued
    while response.status in ("queued", "in_progress"):
        response = client.responses.retrieve(queued.id)
    assert same(response, client.responses.create(**BASE, max_output_tokens=12)) and response.usage.output_tokens == 12
    assert client.responses.cancel(queued.id) == response  # too late


def test_cancelling_ends_it_within_a_step(engine, client):
    endless = BASE | dict(max_output_tokens=3000, extra_body={"ignore_eos": True})
    response = client.responses.create(**endless, background=True)
    while not engine.engine.has_unfinished():
        time.sleep(0.001)
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status == "cancelled" and client.responses.retrieve(response.id) == cancelled
    time.sleep(0.05)
    assert not engine.engine.has_unfinished() and cancelled.usage.output_tokens < 3000
    in_front = client.responses.create(**BASE, max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(in_front.id)


def test_a_broken_stream_is_taken_up_again(client):
    options = BASE | dict(background=True, stream=True, max_output_tokens=20)
    stream = client.responses.create(**options)
    begun = [next(stream) for _ in range(5)]
    stream.close()
    name = begun[0].response.id
    rest = list(client.responses.retrieve(name, stream=True, starting_after=4))
    again = list(client.responses.retrieve(name, stream=True))
    assert [event.to_json() for event in begun + rest] == [event.to_json() for event in again]
    assert [event.type for event in again[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert again[-1].response == client.responses.retrieve(name)


def test_a_failing_response_says_so(engine, client):
    """In the background there is nobody to answer 400 to."""
    long = BASE | dict(input="too long " * 400)
    response = client.responses.create(**long, background=True)
    while response.status in ("queued", "in_progress"):
        response = client.responses.retrieve(response.id)
    assert (response.status, response.error.code) == ("failed", "invalid_prompt")
    assert "512" in response.error.message
    [*_, last] = client.responses.create(**long, background=True, stream=True)
    assert last.type == "response.failed"


def test_async_client(client):
    async def ask():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as own:
            return await asyncio.gather(*(own.responses.create(**BASE, max_output_tokens=5) for _ in range(4)))

    assert len({response.output_text for response in asyncio.run(ask())}) == 1


BAD = [
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": "x"}] * 17}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "none", "output": ""}]}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": TOOLS * 2}, "tools.2.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "none"}}, "tool_choice"),
    ({"tools": [TOOLS[0] | {"parameters": {"type": "string"}}]}, "tools.0.parameters"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "too long " * 400}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 99, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"include": ["reasoning.encrypted_content"]}, "include.0"),
    ({"truncation": "auto"}, "truncation"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}}, "text.format"),
    ({"background": True, "store": False}, "background"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"conversation": "x"}, "conversation"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"model": "other"}, "model"),
]


@pytest.mark.parametrize("change, name", BAD, ids=[f"{place}-{name}" for place, (_, name) in enumerate(BAD)])
def test_what_is_wrong_is_named(client, change, name):
    answer = httpx.post(f"{client.base_url}responses", json=BASE | change)
    assert answer.status_code == (404 if name == "model" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == name or error["param"].startswith(f"{name}."), error
    assert client.responses.create(**BASE, max_output_tokens=1).output


def test_others_are_told_nothing(engine):
    with client_of(engine, api_keys=("mine", "yours")) as nobody:
        mine, yours = (nobody.with_options(api_key=key) for key in ("mine", "yours"))
        name = mine.responses.create(**BASE, max_output_tokens=2).id
        assert mine.responses.retrieve(name).id == name
        for ask in (yours.responses.retrieve, yours.responses.delete, yours.responses.cancel, yours.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(name)
        with pytest.raises(openai.BadRequestError):
            yours.responses.create(**BASE, previous_response_id=name)
        assert mine.responses.retrieve(name).id == name


def test_what_runs_in_the_background_ends_with_the_server(engine):
    with client_of(engine) as client:
        client.responses.create(**BASE, max_output_tokens=400, background=True, extra_body={"ignore_eos": True})
        while not engine.engine.has_unfinished():
            time.sleep(0.001)
    until = time.monotonic() + 5
    while engine.engine.has_unfinished() and time.monotonic() < until:
        time.sleep(0.001)
    assert not engine.engine.has_unfinished()


def test_what_is_kept_is_bounded(engine):
    with client_of(engine, stored_responses=2) as client:
        names = [client.responses.create(**BASE, max_output_tokens=1).id for _ in range(2)]
        client.responses.retrieve(names[0])  # so that the other one has not been used for longest
        names.append(client.responses.create(**BASE, max_output_tokens=1).id)
        assert [client.responses.retrieve(name).id for name in (names[0], names[2])] == [names[0], names[2]]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(names[1])
    with client_of(engine, stored_response_bytes=100) as client:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(client.responses.create(**BASE, max_output_tokens=1).id)
    with client_of(engine, stored_responses=0) as client:
        assert client.responses.create(**BASE, max_output_tokens=1).store is False
        for wish in ({"store": True}, {"background": True}, {"previous_response_id": "x"}):
            with pytest.raises(openai.BadRequestError, match="keeps no responses"):
                client.responses.create(**BASE, **wish)
