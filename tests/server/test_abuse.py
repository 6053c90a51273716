"""Requests and connections that have brought servers like this one down. Each is answered or cut off; meanwhile another
client gets its right tokens, and afterwards nothing of it is left: no request, no block of the cache, no memory."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import threading
import time

import httpx
import pytest
import torch
from abuse_parts import KEPT, memory, others_unharmed, post, refused, served
from server_parts import MODEL, make_model, make_tokenizer

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings

MESSAGES = [{"role": "user", "content": "Tell me"}]
COMPLETE, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(max_num_seqs=16, max_queue=256, max_batch_tokens=64)
    return Engine(make_model(), make_tokenizer(), config)


@pytest.fixture(scope="module")
def address(engine):
    """(host, port)"""
    with served(engine, Settings(model_name=MODEL, request_chat_templates=True)) as address:
        yield address


@pytest.fixture(scope="module")
def expected() -> str:
    ids = torch.tensor([make_tokenizer()("Tell me").input_ids])
    out = make_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return make_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(autouse=True)
def unharmed(address, engine, expected):
    body = {"prompt": "Tell me", "max_tokens": 12, "temperature": 0}
    with others_unharmed(address, engine, COMPLETE, body, expected):
        yield


@pytest.fixture
def client(address):
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as client:
        yield client


def nested(depth: int, leaf="1") -> str:
    return "[" * depth + leaf + "]" * depth


def schema_of_depth(depth: int) -> dict:
    schema: dict = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


REFUSED = {
    "a million completions": (COMPLETE, {"prompt": "a", "n": 10**6}, "n"),
    "n in a chat": (CHAT, {"messages": MESSAGES, "n": 10**6}, "n"),
    "no completions": (COMPLETE, {"prompt": "a", "n": -1}, "n"),
    "best_of": (COMPLETE, {"prompt": "a", "best_of": 10**6}, "best_of"),
    "thousands of prompts": (COMPLETE, {"prompt": ["a"] * 5000}, "prompt"),
    "prompts times n": (COMPLETE, {"prompt": ["a"] * 100, "n": 100}, "n"),
    "no prompts": (COMPLETE, {"prompt": []}, "prompt"),
    "an empty list of tokens": (COMPLETE, {"prompt": [[]]}, "prompt"),
    "one empty among others": (COMPLETE, {"prompt": [[5], []]}, "prompt"),
    "a long prompt": (COMPLETE, {"prompt": "word " * 5000}, "prompt"),
    "a very long prompt": (COMPLETE, {"prompt": "a" * 10**6}, "prompt"),
    "a very long message": (CHAT, {"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages"),
    "a very long text to cut": ("/tokenize", {"prompt": "a" * 10**6}, "prompt"),
    "very many messages": (CHAT, {"messages": MESSAGES * 50_000}, "messages"),
    "thousands of texts": (EMBED, {"input": ["a"] * 5000}, "input"),
    "a very long text": (EMBED, {"input": "a" * 10**6}, "input"),
    "a million wrong texts": (EMBED, {"input": [[1.5]] * 10**6}, "input"),
    "a token that is not there": (EMBED, {"input": [320]}, "input"),
    "vectors of no length": (EMBED, {"input": "a", "dimensions": 0}, "dimensions"),
    "vectors without end": (EMBED, {"input": "a", "dimensions": 10**30}, "dimensions"),
    "a token before the first": (COMPLETE, {"prompt": [-1]}, "prompt"),
    "a token after the last": (COMPLETE, {"prompt": [320]}, "prompt"),
    "a token of 64 bits": (COMPLETE, {"prompt": [2**63]}, "prompt"),
    "a token without end": (COMPLETE, {"prompt": [10**400]}, "prompt"),
    "tokens that are no integers": (COMPLETE, {"prompt": [1.0, True]}, "prompt"),
    "a token to decode": ("/detokenize", {"tokens": [2**63]}, "tokens"),
    "a million wrong tokens": (COMPLETE, {"prompt": [1.5] * 10**6}, "prompt"),
    "a million wrong prompts": (COMPLETE, {"prompt": [[1.5]] * 10**6}, "prompt"),
    "a million wrong stops": (COMPLETE, {"prompt": "a", "stop": [1] * 10**6}, "stop"),
    "very many unknown fields": (COMPLETE, {f"field{i}": 1 for i in range(50_000)}, ""),
    "more members than any object has": (COMPLETE, {f"field{i}": 1 for i in range(70_000)}, "members"),
    "more objects than any request has": (COMPLETE, {"prompt": [{}] * 70_000}, "objects"),
    "logprobs": (COMPLETE, {"prompt": "a", "logprobs": 10**9}, "logprobs"),
    "top_logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 10**9}, "logprobs"),
    "prompt_logprobs": (COMPLETE, {"prompt": "a", "prompt_logprobs": 10**9}, "prompt_logprobs"),
    "no logprobs": (COMPLETE, {"prompt": "a", "logprobs": -5}, "logprobs"),
    "stop strings": (COMPLETE, {"prompt": "a", "stop": ["x"] * 5000}, "stop"),
    "a long stop string": (COMPLETE, {"prompt": "a", "stop": "x" * 10**6}, "stop"),
    "stop tokens": (COMPLETE, {"prompt": "a", "stop_token_ids": [5] * 5000}, "stop_token_ids"),
    "bad words": (COMPLETE, {"prompt": "a", "bad_words": ["x"] * 50_000}, "bad_words"),
    "a long bad word": (COMPLETE, {"prompt": "a", "bad_words": ["x" * 10**6]}, "bad_words"),
    "allowed tokens": (COMPLETE, {"prompt": "a", "allowed_token_ids": [5] * 10**6}, "allowed_token_ids"),
    "an allowed token beyond": (COMPLETE, {"prompt": "a", "allowed_token_ids": [2**62]}, "allowed_token_ids"),
    "entries of logit_bias": (COMPLETE, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    "logit_bias beyond": (COMPLETE, {"prompt": "a", "logit_bias": {"320": 1}}, "logit_bias"),
    "logit_bias before": (COMPLETE, {"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
    "logit_bias of other digits": (COMPLETE, {"prompt": "a", "logit_bias": {"٣": 1}}, "logit_bias"),
    "a bias that is no float": (COMPLETE, {"prompt": "a", "logit_bias": {"5": 10**400}}, "logit_bias"),
    "temperature NaN": (COMPLETE, b'{"prompt": "a", "temperature": NaN}', "NaN"),
    "temperature infinite": (COMPLETE, b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
    "temperature beyond floats": (COMPLETE, b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    "temperature without end": (COMPLETE, {"prompt": "a", "temperature": 10**400}, "temperature"),
    "more digits than Python reads": (COMPLETE, b'{"prompt": "a", "top_k": ' + b"9" * 5000 + b"}", "digits"),
    "seed": (COMPLETE, {"prompt": "a", "seed": 10**30}, "seed"),
    "min_tokens": (COMPLETE, {"prompt": "a", "min_tokens": 10**30}, "min_tokens"),
    "priority": (COMPLETE, {"prompt": "a", "priority": 10**30}, "priority"),
    "half a character": (COMPLETE, b'{"prompt": "\\ud800"}', "JSON"),
    "half a character within": (CHAT, b'{"messages": [], "chat_template_kwargs": {"\\ud800": 1}}', "JSON"),
    "half a character as a name": (COMPLETE, b'{"\\udfff": 1}', ""),
    "no UTF-8": (COMPLETE, b'{"prompt": "\xff"}', "JSON"),
    "a name twice": (COMPLETE, b'{"prompt": "a", "max_tokens": 1, "prompt": "b"}', "twice"),
    "deep JSON": (COMPLETE, ('{"prompt": ' + nested(100_000) + "}").encode(), "JSON"),
    "deep JSON in a free field": (
        CHAT,
        ('{"messages": [], "chat_template_kwargs": {"a": ' + nested(50_000) + "}}").encode(),
        "JSON",
    ),
    "no JSON": (COMPLETE, b"{{{{", "JSON"),
    "nothing": (COMPLETE, b"", ""),
    "null": (COMPLETE, b"null", ""),
    "a list": (COMPLETE, b"[]", ""),
    "a name that breaks lines": (COMPLETE, {"prompt": "a", "request_id": "a\r\nX-Other: 1"}, "request_id"),
    "a long name": (COMPLETE, {"prompt": "a", "request_id": "a" * 10**5}, "request_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_asks_too_much_is_refused_by_name(client, case):
    path, body, word = REFUSED[case]
    refused(post(client, path, body), word)


PROPERTIES = {f"p{i}": {"type": "integer"} for i in range(5000)}
ONE_OF_SIX = {"anyOf": [{"properties": {"k": {"const": j}}} for j in range(6)]}

NO_FORMS = {
    "a deep schema": {"json": schema_of_depth(150)},
    "a deep schema as text": {"json": nested(9999, "{}")},
    "a schema that is only itself": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "a schema from elsewhere": {"json": {"$ref": "http://127.0.0.1:9/schema"}},
    "a huge schema": {"json": {"enum": [f"value{i}" for i in range(50_000)]}},
    "a schema of very many properties": {"json": {"properties": PROPERTIES}},
    "a schema that multiplies": {"json": {"allOf": [ONE_OF_SIX] * 8}},
    "a type that is none": {"json": {"type": "nonsense"}},
    "a regular expression of parentheses": {"regex": "(" * 50_000 + ")" * 50_000},
    "a long regular expression": {"regex": "a" * 10**6},
    "looking around": {"regex": r"(?=a)(\1)"},
    "a grammar of itself": {"grammar": "start: start"},
    "a deep grammar": {"grammar": "start: " + "(" * 9999 + '"a"' + ")" * 9999},
    "a grammar from a file": {"grammar": "%import .passwd.X\nstart: X"},
    "choices": {"choice": ["x"] * 50_000},
}


@pytest.mark.parametrize("case", NO_FORMS)
def test_a_form_that_is_none_or_too_large_is_refused(client, case):
    refused(post(client, COMPLETE, {"prompt": "a", "structured_outputs": NO_FORMS[case]}), "structured_outputs")


TWO = {"x": {"$ref": "#/$defs/a"}, "y": {"$ref": "#/$defs/a"}}
DOUBLING = "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40))

BOUNDED = {
    "a repeated repetition": {"regex": "(a{1,1000}){1,1000}"},
    "repetitions of repetitions": {"regex": "((a{1,100}){1,100}){1,100}"},
    "a catastrophic expression": {"regex": "(a+)+(a*)*(a|a)*b"},
    "an exponential automaton": {"regex": "(.*a){30}.{25}b"},
    "Unicode classes": {"regex": r"(\p{L}{1,200}){1,200}"},
    "very many alternatives": {"regex": "|".join("a{%d}" % i for i in range(1, 2000))},
    "a recursive schema": {"json": {"$defs": {"a": {"properties": TWO}}, "$ref": "#/$defs/a"}},
    "a string of a million": {"json": {"type": "string", "minLength": 10**6}},
    "a list of a million": {"json": {"type": "array", "minItems": 10**6}},
    "a pattern in a schema": {"json": {"type": "string", "pattern": "(a{1,1000}){1,1000}"}},
    "an ambiguous grammar": {"grammar": 'start: a\na: a a | "x"'},
    "a grammar of nothing": {"grammar": 'start: a\na: a a a a | ""'},
    "a doubling grammar": {"grammar": "start: r0\n" + DOUBLING + 'r40: "a"'},
    "repetitions in a grammar": {"grammar": 'start: (("a"{1,1000}){1,1000}){1,1000}'},
    "whitespace": {"json": {"type": "object"}, "whitespace_pattern": "(a{1,1000}){1,1000}"},
}


@pytest.mark.parametrize("case", BOUNDED)
def test_a_form_that_takes_much_work_ends_its_own_request_at_most(client, case):
    """Some of these are fine, others take more steps than one token may."""
    answer = post(client, COMPLETE, {"prompt": "a", "max_tokens": 30, "structured_outputs": BOUNDED[case]})
    if answer.status_code != 200:
        refused(answer, "structured_outputs")


ODD = [
    {"prompt": "a\0b", "stop": "\0"},
    {"prompt": "a", "max_tokens": 10**30, "stop_token_ids": [7]},
    {"prompt": "a", "top_k": 10**18},
    {"prompt": "a", "temperature": 1e300},
    {"prompt": "a", "temperature": 1e-20, "seed": -(2**63)},
    {"prompt": "a", "logit_bias": {"5": 1e30, "6": -1e30}},
    {"prompt": "a", "frequency_penalty": -2, "repetition_penalty": 1e6},
    {"prompt": "", "max_tokens": 1},
    {"prompt": "\u202e\ufeff\U000e0041" * 20},
    {"prompt": [0] * 500, "logprobs": 20, "prompt_logprobs": 20},
]


@pytest.mark.parametrize("body", ODD, ids=lambda body: str(body)[:40])
def test_odd_values_are_taken_or_refused(client, body):
    answer = post(client, COMPLETE, body)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


FEW = ({}, [None])
MANY = (None, [], 2**70, "\0", "x", 1.5, True, -1, [[]], {"a": {"b": []}}, [2**70], ["\0"], {"5": 10**400}, 10**400)


@pytest.mark.parametrize("values", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("path", [CHAT, COMPLETE, EMBED, "/tokenize", "/detokenize"])
def test_wrong_types_everywhere(client, path, values):
    described = client.get("/openapi.json").json()
    form = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = described["components"]["schemas"][form.rpartition("/")[2]]["properties"]
    assert len(fields) >= 3
    base: dict = {CHAT: {"messages": MESSAGES}, "/detokenize": {"tokens": [5]}, EMBED: {"input": "a"}}.get(path, {"prompt": "a"})
    if path in (CHAT, COMPLETE):
        base = base | {"max_tokens": 2}
    for field in fields:
        for value in values:
            answer = post(client, path, base | {field: value})
            assert answer.status_code in (200, 400, 404, 422), (field, value, answer.text)


def test_every_route_reads_bodies_strictly(client):
    """A name twice means two things, whatever the route."""
    paths = client.get("/openapi.json").json()["paths"]
    taking = [path for path, operations in paths.items() if "requestBody" in operations.get("post", {})]
    assert len(taking) >= 4
    for path in taking:
        path = path.replace("{", "").replace("}", "")
        refused(post(client, path, b'{"a": 1, "a": 2}'), "twice")


RESERVED = (
    *("conversation", "messages", "tokenize", "chat_template", "tools", "documents", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
)


@pytest.mark.parametrize("more", [{}, {"chat_template": "{{ messages[0].content }}"}], ids=["the model's", "its own"])
def test_what_a_template_is_called_with_is_not_the_caller_s(client, more):
    for name in RESERVED:
        body = {"messages": MESSAGES, "chat_template_kwargs": {name: True}, "max_tokens": 1}
        refused(post(client, CHAT, body | more), f"chat_template_kwargs.{name}")


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a large range": "{% for i in range(999999999) %}x{% endfor %}",
    "a large text": "{{ 'a' * 10 ** 10 }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "much text": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a wide field": "{{ '%1000000000d' % 1 }}{{ 'x' | center(1000000000) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "the way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "files": "{% include '/etc/passwd' %}",
    "an error": "{{ raise_exception('no') }}",
    "no template": "{{",
    "a long template": "x" * 10**6,
    "deep parentheses": "{{ " + "(" * 20_000 + ")" * 20_000 + " }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_request_s_template_is_bounded_in_time_and_memory(client, case):
    refused(post(client, CHAT, {"messages": MESSAGES, "chat_template": TEMPLATES[case]}), "chat_template")


def test_a_request_s_template_is_the_model_s_own_as_far_as_it_says_the_same(client):
    template = make_tokenizer().chat_template
    asked = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    own = post(client, CHAT, asked).json()
    same = post(client, CHAT, asked | {"chat_template": template}).json()
    assert own["choices"] == same["choices"]
    own = {"chat_template": "Tell {{ whom }}", "chat_template_kwargs": {"whom": "me"}}
    other = post(client, CHAT, asked | own).json()
    asked = {"prompt": "Tell me", "max_tokens": 8, "temperature": 0, "add_special_tokens": False}
    plain = post(client, COMPLETE, asked).json()
    assert other["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


def test_the_same_name_at_once_is_refused_and_harms_nobody(client, address):
    body = {"prompt": "Tell me", "max_tokens": 100, "ignore_eos": True, "temperature": 0, "request_id": "mine"}
    alone = post(client, COMPLETE, body).json()["choices"][0]["text"]
    with client.stream("POST", COMPLETE, json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()
        text = json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        refused(post(client, COMPLETE, {"prompt": "other", "request_id": "mine"}), "request_id")
        for line in lines:
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    assert text == alone


def test_nobody_reads_another_s_prefix_with_a_salt_of_one_s_own(client):
    def cached(salt: str | None) -> int:
        body = {"prompt": "a secret, word by word, " * 8, "max_tokens": 1, "cache_salt": salt}
        return post(client, COMPLETE, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("hers") == 0 and cached("hers") > 0
    for forged in (None, "hers\0", "Hers", " hers", "her", "'hers'", "hers" * 100):
        assert cached(forged) == 0, forged
    assert cached("hers") > 0


# Connections.


HEAD = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def connected(address, data: bytes = b""):
    with socket.create_connection(address) as connection:
        connection.settimeout(60)
        connection.sendall(data)
        yield connection


def answered(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def asking(body: dict, **headers: str) -> bytes:
    content = json.dumps(body).encode()
    fields = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(content))} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {COMPLETE} HTTP/1.1\r\n{lines}\r\n".encode() + content


def test_a_body_of_100_megabytes_is_not_read(address):
    with connected(address, f"{HEAD}Content-Length: {100 * 2**20}\r\n\r\n".encode()) as connection:
        assert answered(connection).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_100_megabytes_in_chunks_is_not_kept(address):
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connected(address, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(100 * 2**20 // 0x10000):
                connection.sendall(piece)
        answer = answered(connection)
        assert answer.startswith(b"HTTP/1.1 413 ") or not answer  # it may be lost as the connection is cut off


def test_compressed_bodies_are_not_unpacked(client):
    packed = gzip.compress(b'{"prompt": "' + b"a" * 50 * 2**20 + b'"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused(client.post(COMPLETE, content=packed, headers=headers), "Content-Encoding", 415)


def test_giant_headers_end_the_connection(address):
    for head in (
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 2**20,
        b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 2**17,
        b"GET /" + b"a" * 2**20,
    ):
        with socket.create_connection(address) as connection, contextlib.suppress(ConnectionError):
            connection.settimeout(60)
            connection.sendall(head)
            assert b" 200 " not in answered(connection)


GARBAGE = [
    bytes(range(256)) * 4,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n" * 1000 + b"nonsense\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:20]))
def test_what_is_no_http_is_cut_off(address, data):
    with socket.create_connection(address) as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(60)
        connection.sendall(data)
        assert b" 200 " not in answered(connection)


def test_two_lengths_of_one_body_smuggle_nothing(address):
    inner = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"{HEAD}Content-Length: {len(inner) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(address, head.encode() + b"0\r\n\r\n" + inner) as connection:
        assert b"transformers" not in answered(connection)


def test_requests_one_behind_another_are_answered_in_order(address):
    bodies = [{"prompt": "Tell me", "max_tokens": count, "ignore_eos": True} for count in (9, 3, 6)]
    data = b"".join(map(asking, bodies)) + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connected(address, data) as connection:
        answers = answered(connection).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert len(answers) == 4
    for answer, count in zip(answers, (9, 3, 6)):
        assert f'"completion_tokens":{count}'.encode() in answer.replace(b" ", b"")


def test_half_open_connections_are_closed(address):
    beginnings = (b"", b"GET /heal", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(address, beginnings[i % 3])) for i in range(150)]
        for connection in connections:
            assert b" 200 " not in answered(connection)  # returns when the server closes


def test_who_leaves_at_once_leaves_nothing(address):
    """In the middle of its prompt, which takes several steps."""
    body = {"prompt": "word " * 90, "max_tokens": 300, "ignore_eos": True}
    for place in range(20):
        with connected(address, asking(body | {"n": 1 + place % 3, "stream": place % 2 == 0})) as connection:
            time.sleep(0.002 * (place % 5))
            if place % 4 == 3:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # with a reset


def test_who_leaves_in_the_middle_of_an_answer_leaves_nothing(address):
    body = {"prompt": "Tell me", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 4}
    for _ in range(5):
        with connected(address, asking(body)) as connection:
            received = b""
            while received.count(b"data: ") < 3:
                received += connection.recv(1000)


def test_who_does_not_read_keeps_nobody_waiting(address, engine):
    """Its request runs to its end all the same, and its answer takes no more memory than it has tokens."""
    body = {"prompt": "Tell me", "max_tokens": 150, "ignore_eos": True, "stream": True, "n": 4, "logprobs": 20}
    before = memory()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(address)
            connection.sendall(asking(body))
        steps = engine.stats()["steps"]
        until = time.monotonic() + 120
        while (engine.stats()["steps"] < steps + 150 or engine.stats()["waiting"]) and time.monotonic() < until:
            time.sleep(0.05)
        assert memory() - before < 4 * KEPT


def test_a_flood_is_answered_429_and_then_as_ever(address):
    """More requests than may wait."""
    body = {"prompt": "Tell me", "max_tokens": 2, "n": 1}
    statuses = []

    def ask() -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        for _ in range(3):
            connection.request("POST", COMPLETE, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 300 and set(statuses) <= {200, 429}
