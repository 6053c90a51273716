"""Whatever the grammar of a format allows, its reader reads as calls that follow their schemas."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from tiny_tokenizer import tiny_tokenizer
from tool_parts import SPECIAL

from hf_paged.integrations.openai.parsing import CALL_FORMATS, AnswerReader, Dialect, answer_form
from hf_paged.integrations.openai.pieces import CallArguments, CallBegins, Content
from hf_paged.integrations.openai.tools import Tool
from hf_paged.runtime.constraint import Constraints

EOS, FIRST_SPECIAL = 2, 320
FLAG = {"type": "boolean"}
SCHEMAS = {
    "get": {"type": "object", "properties": {}, "additionalProperties": False},
    "get_all": {
        "type": "object",
        "properties": {
            "place": {"enum": ["Oslo", 'São "Paulo"']},
            "n": {"type": "integer", "minimum": -9, "maximum": 9},
            "x": {"type": "number", "minimum": 0, "maximum": 1},
            "known": {"type": ["boolean", "null"]},
            "tags": {"type": "array", "items": {"enum": ["a", "b\n"]}, "maxItems": 3},
            "part": {"$ref": "#/$defs/Part"},
            "text": {"type": "string", "maxLength": 3},
        },
        "required": ["n", "part"],
        "additionalProperties": False,
        "$defs": {
            "Part": {"type": "object", "properties": {"k": FLAG}, "required": ["k"], "additionalProperties": False}
        },
    },
    "set": {
        "type": "object",
        "properties": {"a": FLAG, "b": FLAG, "c": {"type": "null"}},
        "additionalProperties": False,
    },
}
TOOLS = {name: Tool(name=name, parameters=schema) for name, schema in SCHEMAS.items()}


def walk(constraint, rng: random.Random) -> list[int] | None:
    """Any output that the constraint allows; None if it finds no end."""
    output: list[int] = []
    while len(output) < 1500:
        allowed = constraint.allowed(output).nonzero().flatten().tolist()
        if EOS in allowed and (allowed == [EOS] or rng.random() < 0.5):
            return output
        special = [token for token in allowed if token >= FIRST_SPECIAL]  # what ends a text that may have any length
        output.append(rng.choice(special if special and rng.random() < 0.3 else [t for t in allowed if t != EOS]))
    return None


@pytest.mark.parametrize("format", [name for name in CALL_FORMATS if name != "transformers"])
@pytest.mark.parametrize("special", [True, False])
def test_what_a_grammar_allows_the_reader_reads(format, special):
    if format == "harmony" and not special:
        special = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]  # reasoning would go on for too long
    tokenizer = tiny_tokenizer(FIRST_SPECIAL)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL if special is True else special or []})
    constraints = Constraints(tokenizer, len(tokenizer))
    dialect = Dialect.of(tokenizer, format)
    called: set[str] = set()
    for seed in range(16):
        one_call = seed % 4 == 0
        form = answer_form(dialect, "ended", None, list(TOOLS.values()), required=True, one_call=one_call)
        constraint = constraints.compile(form, frozenset([EOS])).fork()
        output = walk(constraint, random.Random(seed))
        if output is None:
            continue
        reader = AnswerReader(dialect, TOOLS, prompt="", state="ended")
        pieces = reader.feed(tokenizer.decode(output)) + reader.end()
        calls = [[piece.name, ""] for piece in pieces if isinstance(piece, CallBegins)]
        for piece in pieces:
            assert not isinstance(piece, Content) or not piece.text.strip()
            if isinstance(piece, CallArguments):
                calls[piece.index][1] += piece.text
        assert calls and (len(calls) == 1 or not one_call)
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
            called.add(name)
    assert called == set(SCHEMAS)
