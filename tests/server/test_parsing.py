"""What models write, as their makers document it, becomes reasoning, content and calls; however the text is cut up."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from tool_parts import DESCRIBED, SPECIAL, TEMPLATE

from hf_paged import InvalidArgument
from hf_paged.integrations.openai.parsing import CALL_FORMATS, REASONING_FORMATS, AnswerReader, Dialect
from hf_paged.integrations.openai.pieces import CallArguments, CallBegins, Content, Reasoning, merged
from hf_paged.integrations.openai.tools import Tool

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
TOOLS = {
    "get_weather": Tool(
        name="get_weather",
        parameters={"type": "object", "properties": {"city": STRING, "days": INTEGER, "units": {"enum": ["C", "F"]}}},
    ),
    "add": Tool(
        name="add", parameters={"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "array"}}}
    ),
    "write": Tool(
        name="write", parameters={"type": "object", "properties": {"text": STRING, "to": {"type": ["string", "null"]}}}
    ),
}
PARIS = ("get_weather", {"city": "Paris"})


def tokenizer_of(template: str = TEMPLATE, special=SPECIAL):
    tokenizer = tiny_tokenizer(320)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def pieces_of(parts, calls: str, reasoning: str = "none", *, prompt: str = "", one_call: bool = False, special=SPECIAL):
    dialect = Dialect.of(tokenizer_of(special=special), calls, "auto" if calls == "harmony" else reasoning)
    reader = AnswerReader(dialect, TOOLS, prompt=prompt, state=dialect.state(prompt, None), one_call=one_call)
    pieces = [piece for part in parts for piece in reader.feed(part)]
    return merged(pieces + reader.end())


def summed_up(pieces) -> dict:
    calls = [[piece.name, ""] for piece in pieces if isinstance(piece, CallBegins)]
    for piece in pieces:
        if isinstance(piece, CallArguments):
            calls[piece.index][1] += piece.text
    return {
        "reasoning": "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        "content": "".join(piece.text for piece in pieces if isinstance(piece, Content)),
        "calls": [(name, json.loads(arguments)) for name, arguments in calls],
    }


EXAMPLES = [
    # format of calls, of reasoning, end of the prompt, text, reasoning, content, calls
    (
        "hermes",
        "think",
        "",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        "",
        [PARIS],
    ),
    (
        "hermes",
        "think",
        "",
        "<think>\nThe user wants the weather.\nI call.\n</think>\n\nLet me look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": ["}", {"c": "\\"]"}]}}\n</tool_call>',
        "The user wants the weather.\nI call.",
        "Let me look.\n",
        [PARIS, ("add", {"a": 1, "b": ["}", {"c": '"]'}]})],
    ),
    ("hermes", "think", "<think>\n", "Hm.\n</think>\n\nIt is <b>fine</b>.", "Hm.", "It is <b>fine</b>.", []),
    ("hermes", "think", "<think>\n\n</think>\n\n", "It is fine.", "", "It is fine.", []),
    ("hermes", "deepseek_r1", "", "Hm.\n</think>\n\nIt is fine.", "Hm.", "It is fine.", []),
    ("hermes", "deepseek_r1", "", "<think>Hm.\n\n", "Hm.\n\n", "", []),
    (
        "hermes",
        "none",
        "",
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>',
        "",
        "",
        [PARIS],
    ),
    (
        "hermes",
        "none",
        "",
        '<tool_call>{"arguments": "{\\"city\\": \\"Paris\\"}", "name": "get_weather"}',
        "",
        "",
        [PARIS],
    ),
    ("hermes", "none", "", '<tool_call>\n{"name": "get_weather"}\n</tool_call>', "", "", [("get_weather", {})]),
    (
        "qwen3_coder",
        "think",
        "",
        'I will.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nPa"ris\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=write>\n<parameter=text>\nif a < b:\n    </p>\n\n</parameter>\n"
        "<parameter=to>\nnull\n</parameter>\n</function>\n</tool_call>",
        "",
        "I will.\n\n",
        [("get_weather", {"city": 'Pa"ris', "days": 3}), ("write", {"text": "if a < b:\n    </p>\n", "to": None})],
    ),
    (
        "qwen3_coder",
        "none",
        "",
        "<function=add>\n<parameter=a>\n1.5\n</parameter>\n<parameter=b>\n[true, null]\n</parameter>\n</function>",
        "",
        "",
        [("add", {"a": 1.5, "b": [True, None]})],
    ),
    ("qwen3_coder", "none", "", "<tool_call>\n<function=add>\n</function>\n</tool_call>", "", "", [("add", {})]),
    ("llama3_json", "none", "", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", "", [PARIS]),
    (
        "llama3_json",
        "none",
        "",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "add", "parameters": {"a": -1}}',
        "",
        "",
        [PARIS, ("add", {"a": -1})],
    ),
    (
        "llama3_json",
        "none",
        "",
        '<|python_start|>I look.<|python_end|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        "I look.",
        [PARIS],
    ),
    (
        "llama3_json",
        "none",
        "",
        '{"city": "Paris", "name": "get_weather"}',
        "",
        '{"city": "Paris", "name": "get_weather"}',
        [],
    ),
    (
        "mistral",
        "none",
        "",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "add", "arguments": {"a": 2}}]',
        "",
        "",
        [PARIS, ("add", {"a": 2})],
    ),
    (
        "mistral",
        "mistral",
        "",
        '[THINK]Hm, Paris.[/THINK]I look.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abcDEF123[ARGS]{"a": 2}',
        "Hm, Paris.",
        "I look.",
        [PARIS, ("add", {"a": 2})],
    ),
    ("mistral", "none", "", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", "", [PARIS]),
    ("pythonic", "none", "", "[get_weather(city='Paris')]", "", "", [PARIS]),
    (
        "pythonic",
        "none",
        "",
        '[get_weather(city="It\\\'s \\u00e9\\n\\"Paris\\"", days=-3), add(a=1.5e3, b=[1, (None, True), {"x": \'y\'}],)]',
        "",
        "",
        [
            ("get_weather", {"city": 'It\'s é\n"Paris"', "days": -3}),
            ("add", {"a": 1500.0, "b": [1, [None, True], {"x": "y"}]}),
        ],
    ),
    (
        "pythonic",
        "none",
        "",
        "[1, 2] and [get_weather(city='Paris')]",
        "",
        "[1, 2] and [get_weather(city='Paris')]",
        [],
    ),
    ("pythonic", "none", "", "<|python_start|>[get_weather(city='Paris')]<|python_end|>", "", "", [PARIS]),
    (
        "lfm2",
        "none",
        "",
        '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>I look it up.',
        "",
        "I look it up.",
        [PARIS],
    ),
    (
        "deepseek_v3",
        "deepseek_r1",
        "<｜Assistant｜><think>\n",
        "Hm.\n</think>\n\nI look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 2}\n'
        "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Hm.",
        "I look.",
        [PARIS, ("add", {"a": 2})],
    ),
    (
        "deepseek_v31",
        "think",
        "</think>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        "",
        [PARIS, ("add", {"a": 2})],
    ),
    (
        "harmony",
        "none",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}',
        "Need the weather.",
        "",
        [PARIS],
    ),
    (
        "harmony",
        "none",
        "<|start|>assistant",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json"
        '<|message|>{"city": "Paris"}',
        "",
        "I look.",
        [PARIS],
    ),
    (
        "harmony",
        "none",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is fine.",
        "One.\nTwo.",
        "It is fine.",
        [],
    ),
    ("harmony", "none", "<|start|>assistant", "Just talk.", "", "Just talk.", []),
]


@pytest.mark.parametrize(("calls", "reasoning", "prompt", "text", "thought", "content", "expected"), EXAMPLES)
@pytest.mark.parametrize("size", [1, 5, 10**6])
def test_published_examples(calls, reasoning, prompt, text, thought, content, expected, size):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = summed_up(pieces_of(parts, calls, reasoning, prompt=prompt))
    assert found == {"reasoning": thought, "content": content, "calls": expected}


def without_ids(pieces):
    return [CallBegins(piece.index, "", piece.name) if isinstance(piece, CallBegins) else piece for piece in pieces]


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "<parameter=",
        "</parameter>",
        "</function>",
        "<think>",
        "</think>",
        "[",
        "]",
    ),
    *SPECIAL,
    *(
        "get_weather",
        "add",
        "city",
        ">",
        "{",
        "}",
        '"',
        "\\",
        ":",
        ",",
        ";",
        "(",
        ")",
        "=",
        "'",
        "\n",
        " ",
        "to=",
        "x",
        "1",
        "é",
    ),
    *(
        '{"name": "add", "arguments": ',
        '{"a": 1}',
        "function",
        "```json\n",
        "\n```",
        "analysis",
        "commentary",
        "final",
        "assistant",
    ),
    *(example[3] for example in EXAMPLES),
]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.data(),
    st.sampled_from([name for name in CALL_FORMATS if name != "transformers"]),
    st.sampled_from(["none", *REASONING_FORMATS]),
    st.booleans(),
)
def test_however_a_text_is_cut_up_the_pieces_are_the_same(text, data, calls, reasoning, one_call):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]
    whole = pieces_of([text], calls, reasoning, one_call=one_call)
    assert without_ids(pieces_of(parts, calls, reasoning, one_call=one_call)) == without_ids(whole)
    assert without_ids(pieces_of(text, calls, reasoning, one_call=one_call)) == without_ids(whole)
    assert sum(isinstance(piece, CallBegins) for piece in whole) <= 1 or not one_call


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"])), st.sampled_from(CALL_FORMATS))
def test_plain_text_comes_through_unchanged(text, calls):
    if calls != "transformers" and not text.lstrip().startswith("to="):
        assert summed_up(pieces_of(text, calls)) == {"reasoning": "", "content": text, "calls": []}


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("hermes", "<tool_call>no JSON</tool_call>"),
        ("hermes", '<tool_call>{"name": "add", "arguments": 3}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add" "arguments": {}}</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        ("llama3_json", '{"name": "unknown", "parameters": {}}'),
        ("llama3_json", '{"name": "add"}'),
        ("pythonic", "[unknown(a=1)]"),
        ("pythonic", "[add(1)]"),
        ("pythonic", "[add(a=__import__('os').getcwd())]"),
        ("pythonic", "[add(a=" + "[" * 1000 + "]" * 1000 + ")]"),
        ("pythonic", "[add(a=1e999)]"),
    ],
)
def test_what_is_no_call_is_text(calls, text):
    assert summed_up(pieces_of(text, calls)) == {"reasoning": "", "content": text, "calls": []}


@pytest.mark.parametrize("text", ['[TOOL_CALLS][{"nome": 1}]', "[TOOL_CALLS]unknown[ARGS]{}"])
def test_special_tokens_never_show(text):
    content = summed_up(pieces_of(text, "mistral"))["content"]
    assert content and not any(token in content for token in SPECIAL)


def test_arguments_that_break_off_stay_as_the_model_wrote_them():
    pieces = pieces_of('<tool_call>{"name": "add", "arguments": {"a": 1, "b": !}}</tool_call> done', "hermes")
    assert [piece.text for piece in pieces if isinstance(piece, CallArguments)] == ['{"a": 1, "b": !}}']
    assert pieces[-1] == Content(" done")


def test_arguments_come_before_a_call_is_complete():
    dialect = Dialect.of(tokenizer_of(), "hermes", "none")
    reader = AnswerReader(dialect, TOOLS, prompt="", state="ended")
    reader.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa')
    assert reader.feed("ris") == [CallArguments(0, "ris")]


def test_only_what_may_become_a_marker_is_held_back():
    dialect = Dialect.of(tokenizer_of(), "hermes", "none")
    reader = AnswerReader(dialect, TOOLS, prompt="", state="ended")
    assert reader.feed("a <tool") == [Content("a ")]
    assert reader.feed("box <") == [Content("<toolbox ")]
    assert reader.end() == [Content("<")]


def test_ids_are_as_templates_want_them():
    ids = [
        p.id
        for p in pieces_of(["[TOOL_CALLS]add[ARGS]{}[TOOL_CALLS]add[CALL_ID]abcDEF123[ARGS]{}"], "mistral")
        if isinstance(p, CallBegins)
    ]
    assert len(ids[0]) == 9 and ids[0].isalnum() and ids[1] == "abcDEF123"


LONG = [
    ("hermes", "<tool_call>", 1000),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"b": "%s', 5000),
    ("hermes", "<", 5000),
    ("qwen3_coder", "<tool_call><function=write><parameter=text>%s", 5000),
    ("pythonic", "[add(b=[%s", 5000),
    ("pythonic", "[add(b='%s", 5000),
    ("llama3_json", '{"parameters": {"a": "%s', 5000),
    ("harmony", "<|channel|>analysis<|message|>", 500),
    ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", 500),
    ("mistral", "[TOOL_CALLS]", 1000),
]


@pytest.mark.parametrize(("calls", "text", "count"), LONG)
@pytest.mark.parametrize("size", [3, 10**6])
def test_work_grows_with_the_text_alone(calls, text, count, size):
    """Counted in calls of functions, of which eight times the text takes eight times as many: nothing is read twice."""

    def work(count: int) -> int:
        whole = text % ("\\1, [" * (count // 5)) if "%s" in text else text * count
        parts = [whole[i : i + size] for i in range(0, len(whole), size)]
        dialect = Dialect.of(tokenizer_of(), calls)
        reader = AnswerReader(dialect, TOOLS, prompt="", state="ended")
        number = 0

        def counted(frame, event, argument):
            nonlocal number
            number += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(counted)
        try:
            for part in parts:
                reader.feed(part)
            reader.end()
        finally:
            sys.setprofile(before)
        return number

    assert work(count) < 10 * work(count // 8) + 1000


TEMPLATES = {
    "hermes": '{{ tools }}<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><think></think>',
    "qwen3_coder": "{{ tools }}<tool_call>\n<function=example>\n<parameter=p>\n",
    "llama3_json": '{{ "Respond in the format {\\"name\\": function name, \\"parameters\\": dictionary of arguments}" }}',
    "mistral": "{{ '[TOOL_CALLS]' }}",
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "lfm2": "List of tools: <|tool_list_start|>[",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '\\n```json'{{ c.split('</think>') }}",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "harmony": "<|channel|>commentary<|message|>",
    "none": "{{ messages }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_the_formats(name):
    reasoning = {"hermes": "think", "deepseek_v3": "deepseek_r1", "harmony": "harmony"}.get(name)
    names = Dialect.of(tokenizer_of(TEMPLATES[name])).names
    assert names == {"tool_parser": None if name == "none" else name, "reasoning_parser": reasoning}
    chosen = Dialect.of(tokenizer_of(TEMPLATES[name]), "hermes", "mistral").names
    assert chosen == {"tool_parser": "hermes", "reasoning_parser": "mistral"}
    assert Dialect.of(tokenizer_of(TEMPLATES[name]), "none", "none").silent


def test_unknown_formats_are_refused_with_the_known_ones():
    for options in (
        dict(calls="json"),
        dict(reasoning="deep"),
        dict(calls="transformers"),
        dict(calls="harmony", reasoning="think"),
    ):
        with pytest.raises(InvalidArgument, match="tool_parser|reasoning_parser"):
            Dialect.of(tokenizer_of(), **options)


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_transformers_parser_where_the_tokenizer_describes_the_answers(size):
    tokenizer = tokenizer_of("{{ messages }}")
    tokenizer.response_template = DESCRIBED
    dialect = Dialect.of(tokenizer)
    assert dialect.names == {"tool_parser": "transformers", "reasoning_parser": "transformers"}

    def read(text: str, prompt: str = "<assistant>"):
        reader = AnswerReader(dialect, TOOLS, prompt=prompt, state=dialect.state(prompt, None))
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        pieces = [piece for part in parts for piece in reader.feed(part)]
        return summed_up(pieces + reader.end())

    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert read(f"<think>Hm.</think>I look.{call}") == {"reasoning": "Hm.", "content": "I look.", "calls": [PARIS]}
    assert read(f"Hm.</think>{call}", "<assistant><think>") == {"reasoning": "Hm.", "content": "", "calls": [PARIS]}
    broken = read("I look.<tool_call>{no JSON</tool_call> Done.")
    assert (
        broken["calls"] == []
        and broken["content"].startswith("I look.{no JSON")
        and broken["content"].endswith(" Done.")
    )
