"""Calls and reasoning through the real client. Grammars make any model call, scripts have it say what real ones say."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel
from server_parts import MODEL
from tool_parts import DESCRIBED, MESSAGES, SCHEMAS, TEMPLATE, TOOLS, client_of, make_engine, streamed

from hf_paged.integrations.openai import Limits

FORMATS = (
    "hermes",
    "qwen3_coder",
    "llama3_json",
    "mistral",
    "pythonic",
    "lfm2",
    "deepseek_v3",
    "deepseek_v31",
    "harmony",
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
BASE = dict(model=MODEL, messages=MESSAGES, max_tokens=350)


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(autouse=True)
def no_script(engine):
    yield
    engine.script = engine.beginning = None
    assert not engine.engine.has_unfinished()


@pytest.fixture(scope="module")
def client(engine):
    """Of a server for Qwen's format of calls, and reasoning between tags."""
    with client_of(engine, tool_parser="hermes", reasoning_parser="think") as client:
        yield client


def check(calls) -> None:
    assert calls and len({id for id, _, _ in calls}) == len(calls)
    for _, name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def flat(message) -> list:
    return [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]


@pytest.mark.parametrize("format", FORMATS)
def test_any_model_calls_in_any_format_when_it_must(engine, format):
    with client_of(engine, tool_parser=format) as client:
        options = BASE | dict(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        options["logit_bias"] = {
            str(engine.engine.tokenizer.convert_tokens_to_ids("<|end|>")): 6
        }  # of harmony's reasoning
        answer = client.chat.completions.create(**options, seed=3).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        check(flat(answer.message))
        content, _, calls, reason = streamed(client, **options, seed=3)
        assert content is None and reason == "tool_calls" and len(calls) == 1
        assert [call[1:] for call in calls] == [list(call[1:]) for call in flat(answer.message)]
        named = {"type": "function", "function": {"name": "add"}}
        for seed in range(2):
            answer = client.chat.completions.create(**options | dict(tool_choice=named, seed=seed)).choices[0]
            assert [name for _, name, _ in flat(answer.message)] == ["add"]
            check(flat(answer.message))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("marked", [True, False])
def test_strict_tools_are_called_right_when_the_model_chooses_to(engine, format, marked):
    """The model is biased towards what begins a call: then the grammar takes over."""
    begins = {
        "hermes": "<tool_call>",
        "qwen3_coder": "<tool_call>",
        "llama3_json": "{",
        "mistral": "[TOOL_CALLS]",
        "pythonic": "[",
    }
    begins |= {"lfm2": "<|tool_call_start|>", "harmony": "<|channel|>commentary to=functions.add"}
    begin = begins.get(format, "<｜tool▁calls▁begin｜>") if marked else "Well"
    engine.beginning = begin if marked or format != "harmony" else "<|channel|>final<|message|>Well"
    with client_of(engine, tool_parser=format) as client:
        strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
        answer = client.chat.completions.create(**BASE | dict(tools=strict, seed=1, max_tokens=200)).choices[0]
        if marked:
            check(flat(answer.message)[:1])
        else:
            assert answer.message.content.startswith("Well")


class GetWeather(BaseModel):
    """Tell the weather."""

    city: Literal["Paris", "Oslo"]
    units: Literal["C", "F"]


class Place(BaseModel):
    country: Literal["FR", "NO"]


class Visit(BaseModel):
    """Visit a place: its schema refers to a part of itself."""

    place: Place


@pytest.mark.parametrize("format", ["hermes", "llama3_json", "pythonic"])
def test_the_client_parses_calls_into_models(engine, format):
    tools = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(Visit)]
    with client_of(engine, tool_parser=format) as client:
        options = BASE | dict(tools=tools, tool_choice="required", parallel_tool_calls=False, seed=5)
        call = client.chat.completions.parse(**options).choices[0].message.tool_calls[0]
        assert isinstance(call.function.parsed_arguments, GetWeather | Visit)
        with client.chat.completions.stream(**options) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments
        assert final.finish_reason == "tool_calls"


def test_calls_a_model_chooses_to_make(client, engine):
    engine.script = f"<think>\nThey ask.\n</think>\n\nI look.\n{CALL}\n{CALL}"
    options = BASE | dict(tools=TOOLS)
    answer = client.chat.completions.create(**options)
    message = answer.choices[0].message
    assert message.content == "I look.\n" and message.reasoning_content == message.reasoning == "They ask."
    assert [(name, arguments) for _, name, arguments in flat(message)] == [("get_weather", '{"city": "Oslo"}')] * 2
    assert answer.choices[0].finish_reason == "tool_calls"
    content, reasoning, calls, reason = streamed(client, **options)
    assert (content, reasoning, reason) == (message.content, message.reasoning, "tool_calls")
    check(calls)
    one = client.chat.completions.create(**options, parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1 and one.content == "I look.\n"
    assert len(streamed(client, **options, parallel_tool_calls=False)[2]) == 1


@pytest.mark.parametrize(
    ("opening", "beginning"), [("<think>\n", "Hm: <tool_call>?\n</think>"), ("", "<think>Hm.</think>")]
)
def test_a_model_thinks_before_it_calls_what_it_must(client, engine, opening, beginning):
    engine.beginning = beginning
    options = BASE | dict(tools=TOOLS, seed=1, extra_body={"chat_template_kwargs": {"opening": opening}})
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for demand in (dict(tool_choice="required"), dict(tools=strict)):
        engine.beginning = beginning if "tool_choice" in demand else f"{beginning}\n\n<tool_call>"
        choice = client.chat.completions.create(**options | demand).choices[0]
        assert choice.message.reasoning.startswith("Hm") and "<tool_call>" not in (choice.message.content or "")
        check(flat(choice.message)[:1])


def test_several_answers_each_have_their_own_calls(client, engine):
    engine.script = CALL
    answer = client.chat.completions.create(**BASE, tools=TOOLS, n=3)
    ids = [choice.message.tool_calls[0].id for choice in answer.choices]
    assert len(set(ids)) == 3 and all(choice.message.content is None for choice in answer.choices)


def test_reasoning_is_told_counted_and_left_out(client, engine):
    thought = "<think>\nThey ask.\n</think>\n\n"
    engine.script = thought + "Fine."
    answer = client.chat.completions.create(**BASE, logprobs=True)
    choice = answer.choices[0]
    assert (choice.message.reasoning, choice.message.content, choice.finish_reason) == ("They ask.", "Fine.", "stop")
    tokens = engine.engine.tokenizer
    upto = lambda text: len(tokens(text, add_special_tokens=False).input_ids)  # noqa: E731
    expected = upto("<think>\nThey ask.\n</think>") - upto("<think>")
    assert answer.usage.completion_tokens_details.reasoning_tokens == expected
    texts = [entry.token for entry in choice.logprobs.content]
    assert "".join(texts) == engine.script + tokens.eos_token and len(texts) == answer.usage.completion_tokens
    entries = []
    for chunk in client.chat.completions.create(
        **BASE, logprobs=True, stream=True, stream_options={"include_usage": True}
    ):
        entries += [entry for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content]
    assert entries == choice.logprobs.content
    assert chunk.usage.completion_tokens_details == answer.usage.completion_tokens_details
    hidden = client.chat.completions.create(**BASE, extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "Fine." and not hasattr(hidden, "reasoning")
    content, reasoning, _, _ = streamed(client, **BASE, extra_body={"include_reasoning": False})
    assert (content, reasoning) == ("Fine.", None)
    engine.script = "No thought."
    assert client.chat.completions.create(**BASE).usage.completion_tokens_details.reasoning_tokens == 0


NUMBER = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "number", "schema": NUMBER, "strict": True}}


@pytest.mark.parametrize(
    ("format", "opening", "beginning"),
    [
        ("hermes", "", "{"),
        ("hermes", "", "<think>\nHm.\n</think>"),
        ("hermes", "<think>\n", 'Is it {"n": 3}?\n</think>'),
        ("hermes", "<think>\n\n</think>\n\n", ""),
        ("mistral", "", "[THINK]Hm.[/THINK]"),
        ("harmony", "", ""),
        ("harmony", "", "<|channel|>analysis<|message|>Hm.<|end|>"),
    ],
)
def test_a_form_is_that_of_the_content_after_the_reasoning(engine, format, opening, beginning):
    reasoning = {"hermes": "think", "mistral": "mistral", "harmony": "auto"}[format]
    engine.beginning = beginning or None
    end = engine.engine.tokenizer.convert_tokens_to_ids("<|end|>")
    extra = {"chat_template_kwargs": {"opening": opening}, "logit_bias": {str(end): 6}}
    with client_of(engine, tool_parser=format, reasoning_parser=reasoning) as client:
        for seed in range(2):
            choice = client.chat.completions.create(**BASE, response_format=FORM, extra_body=extra, seed=seed).choices[
                0
            ]
            assert choice.finish_reason == "stop"
            assert json.loads(choice.message.content)["n"] in (1, 2)
            if len(beginning) > 1:
                assert choice.message.reasoning in ("Hm.", 'Is it {"n": 3}?')
    engine.beginning = beginning if len(beginning) > 1 else None
    regex = {"structured_outputs": {"regex": "[a-c]/[0-9]"}}
    with client_of(engine, tool_parser=format, reasoning_parser=reasoning) as client:
        content = client.chat.completions.create(**BASE, extra_body=extra | regex).choices[0].message.content
        assert re.fullmatch("[a-c]/[0-9]", content)


def test_a_form_beside_tools_is_that_of_answers_without_calls(client, engine):
    for beginning in ("{", "<tool_call>"):
        engine.beginning = beginning
        choice = client.chat.completions.create(**BASE, tools=TOOLS, response_format=FORM, seed=2).choices[0]
        if beginning == "{":
            assert json.loads(choice.message.content)["n"] in (1, 2) and choice.message.tool_calls is None
        else:
            assert choice.message.content is None
            check(flat(choice.message))


def test_messages_reach_the_template_as_it_expects_them(client, engine):
    engine.script = "Fine."
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7, "exact": true}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "8"},
    ]
    options = BASE | dict(messages=messages, extra_body={"return_token_ids": True})
    answer = client.chat.completions.create(**options, tools=TOOLS, reasoning_effort="low")
    prompt = engine.engine.tokenizer.decode(answer.prompt_token_ids)
    expected = "[get_weather][add](low)<user>Weather?.<assistant>#Hm.#add:a=7;exact=True;.<tool>8@add.<assistant>"
    assert prompt == expected
    for choice, told in (
        ("none", ""),
        ({"type": "function", "function": {"name": "add"}}, "[add]"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "add"}}]},
            },
            "[add]",
        ),
    ):
        if choice == "none" or choice["type"] == "allowed_tools":
            answer = client.chat.completions.create(**options, tools=TOOLS, tool_choice=choice)
            assert engine.engine.tokenizer.decode(answer.prompt_token_ids).startswith(f"{told}<user>")
    engine.script = CALL
    plain = client.chat.completions.create(**BASE, tools=TOOLS, tool_choice="none").choices[0]
    assert plain.message.content == CALL and plain.message.tool_calls is None and plain.finish_reason == "stop"


def test_stop_strings_and_continued_messages(client, engine):
    engine.script = f"I look.{CALL}"
    choice = client.chat.completions.create(**BASE, tools=TOOLS, stop=["Oslo"]).choices[0]
    assert flat(choice.message)[0][2] == '{"city": "' and choice.finish_reason == "tool_calls"
    engine.script = " rest</think>Yes."
    messages = [*MESSAGES, {"role": "assistant", "content": "<think>The"}]
    options = BASE | dict(messages=messages, extra_body={"continue_final_message": True, "echo": True})
    message = client.chat.completions.create(**options).choices[0].message
    assert (message.reasoning, message.content) == (" rest", "<think>TheYes.")


def test_special_tokens_are_seen_by_the_format_alone(engine):
    with client_of(engine, tool_parser="mistral", reasoning_parser="mistral") as client:
        engine.script = '[THINK]Hm.[/THINK]I look<|end|>.[TOOL_CALLS]add[ARGS]{"a": 1, "exact": true}'
        message = client.chat.completions.create(**BASE, tools=TOOLS).choices[0].message
        assert (message.reasoning, message.content) == ("Hm.", "I look.")
        assert (
            len(message.tool_calls[0].id) == 9 and message.tool_calls[0].function.arguments == '{"a": 1, "exact": true}'
        )
        shown = (
            client.chat.completions.create(**BASE, tools=TOOLS, extra_body={"skip_special_tokens": False})
            .choices[0]
            .message
        )
        assert shown.content == "I look<|end|>." and len(shown.tool_calls) == 1
        plain = client.chat.completions.create(**BASE).choices[0].message
        assert plain.content == 'I look.add{"a": 1, "exact": true}' and plain.tool_calls is None


def test_what_was_chosen_shows(client):
    model = client.models.retrieve(MODEL)
    assert (model.tool_parser, model.reasoning_parser) == ("hermes", "think")


def tool(name="f", **function) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (dict(tools=[tool(), tool()]), "tools.1.function.name"),
        (dict(tools=[tool(name="a b")]), "tools.0.function.name"),
        (dict(tools=[tool(name="x" * 65)]), "tools.0.function.name"),
        (dict(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools.0.type"),
        (dict(tools="f"), "tools"),
        (dict(tools=[tool(parameters=[])]), "tools.0.function.parameters"),
        (dict(tools=[tool(parameters={"type": "string"})]), "tools.0.function.parameters"),
        (dict(tools=[tool(parameters={"properties": 3})]), "tools.0.function.parameters"),
        (dict(tools=[tool(parameters={"required": "a"})]), "tools.0.function.parameters"),
        (
            dict(tools=[tool(), tool(name="g", strict=True, parameters={"$ref": "#/none"})]),
            "tools.1.function.parameters",
        ),
        (dict(tools=[tool(name=f"f{i}") for i in range(9)]), "tools"),
        (dict(tools=[tool(description="x" * 5000)]), "tools"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(tools=TOOLS, tool_choice=tool(name="other")), "tool_choice"),
        (dict(tools=TOOLS, tool_choice="maybe"), "tool_choice"),
        (dict(tools=TOOLS, tool_choice="required", response_format={"type": "json_object"}), "tool_choice"),
        (dict(tools=TOOLS, parallel_tool_calls="no"), "parallel_tool_calls"),
        (dict(extra_body={"functions": [{"name": "f"}]}), "functions"),
        (dict(extra_body={"function_call": "auto"}), "function_call"),
        (dict(reasoning_effort="huge"), "reasoning_effort"),
        (dict(messages=[{"role": "tool", "content": "x"}]), "messages.0.tool_call_id"),
        (dict(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]), "messages.0.tool_call_id"),
        (dict(messages=[{"role": "user", "content": "x", "reasoning_content": "y"}]), "messages.0.reasoning_content"),
        (
            dict(
                messages=[
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            ),
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(engine, small, options, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        small.chat.completions.create(**BASE | dict(stream=stream) | options)
    assert caught.value.body["param"].startswith(param) and caught.value.body["message"]


@pytest.fixture(scope="module")
def small(engine):
    with client_of(engine, tool_parser="hermes", limits=Limits(tools=8, tool_characters=4000)) as client:
        yield client


def test_what_the_model_cannot_is_refused(engine):
    with client_of(engine, tool_parser="none") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**BASE, tools=TOOLS)
        assert caught.value.body["param"] == "tools"
        engine.script = "Fine."
        assert (
            client.chat.completions.create(**BASE, tools=TOOLS, tool_choice="none").choices[0].message.content
            == "Fine."
        )
    with client_of(engine, tool_parser="llama3_json") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**BASE, tools=TOOLS, response_format={"type": "json_object"})
        assert caught.value.body["param"] == "response_format"
    engine.engine.tokenizer.response_template = DESCRIBED
    try:
        with client_of(engine, tool_parser="transformers") as client:
            engine.script = f"<think>Hm.</think>{CALL}"
            message = client.chat.completions.create(**BASE, tools=TOOLS).choices[0].message
            assert message.reasoning == "Hm." and [call[1] for call in flat(message)] == ["get_weather"]
            for options, param in (
                (dict(tool_choice="required"), "tools"),
                (dict(response_format=FORM), "response_format"),
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    client.chat.completions.create(**BASE, tools=TOOLS, **options)
                assert caught.value.body["param"] == param
    finally:
        engine.engine.tokenizer.response_template = None
    engine.engine.tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        with client_of(engine, tool_parser="hermes") as client:
            for options in (dict(tools=TOOLS), dict(reasoning_effort="low")):
                with pytest.raises(openai.BadRequestError) as caught:
                    client.chat.completions.create(**BASE, **options)
                assert caught.value.body["param"] in options
    finally:
        engine.engine.tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize("depth", [60, 3000])
def test_schemas_too_deep_harm_nobody(client, engine, depth):
    schema = '{"type": "object", "properties": {"a": ' * depth + '{"$ref": "#/none"}' + "}}" * depth
    body = json.dumps(BASE | dict(tools=[tool(parameters="SCHEMA")], tool_choice="required")).replace(
        '"SCHEMA"', schema
    )
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{client.base_url}chat/completions", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    engine.script = "Fine."
    assert client.chat.completions.create(**BASE).choices[0].message.content == "Fine."


def test_tokenize_knows_tools(client, engine):
    text = client.with_options(base_url=str(client.base_url).removesuffix("/v1/")).post(
        "/tokenize", body={"messages": MESSAGES, "tools": TOOLS}, cast_to=object
    )
    assert engine.engine.tokenizer.decode(text["tokens"]) == "[get_weather][add]<user>Weather?.<assistant>"
