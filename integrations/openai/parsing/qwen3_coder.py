"""<tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3-Coder and its successors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import NAME_CHARACTERS, CallFormat
from .json_text import dumps
from .lark import Lark, quoted
from .scanner import SPACE, Reading, Scanner

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_WORDS = {"True": True, "False": False, "None": None}
_STRING_RULES = ("pattern", "format", "minLength", "maxLength")


class Qwen3Coder(CallFormat):
    """Values stand as they are, without quotes: what they are, the tool's schema says."""

    name = "qwen3_coder"
    markers = (BEGIN, END)
    marker = BEGIN

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        while marker := (yield from scanner.until((BEGIN, FUNCTION), scanner.say)):
            scanner.keep()
            name = None
            if marker == BEGIN:
                yield from scanner.take_while(SPACE)
            if marker == FUNCTION or (yield from scanner.skip(FUNCTION)):
                name = yield from scanner.take_while(NAME_CHARACTERS)
            complete = name in tools and (yield from scanner.skip(">"))
            text = scanner.kept()
            if complete:
                yield from self._call(scanner, tools[name])
            else:
                scanner.say(scanner.visible(marker + text))

    def _call(self, scanner: Scanner, tool: Tool) -> Reading[None]:
        scanner.call(tool.name)
        separator = "{"
        while True:
            yield from scanner.take_while(SPACE)
            if not (yield from scanner.skip(PARAMETER)):
                break
            parts: list[str] = []
            if not (yield from scanner.until((">",), parts.append)):
                return
            key = "".join(parts)
            scanner.arguments(f"{separator}{dumps(key)}: ")
            separator = ", "
            if not (yield from self._value(scanner, _schema(tool, key))):
                return
        if not (yield from scanner.more()):
            return  # cut off
        scanner.arguments("{}" if separator == "{" else "}")
        yield from scanner.skip(FUNCTION_END)
        yield from scanner.take_while(SPACE)
        yield from scanner.skip(END)

    def _value(self, scanner: Scanner, schema: dict) -> Reading[bool]:
        """False if it is cut off."""
        ends = (f"\n{PARAMETER_END}", PARAMETER_END)
        yield from scanner.skip("\n")
        kinds = _kinds(schema)
        if kinds == {"string"}:
            scanner.arguments('"')
            if not (yield from scanner.until(ends, lambda text: scanner.arguments(dumps(text)[1:-1]))):
                return False
            scanner.arguments('"')
            return True
        parts: list[str] = []
        if not (yield from scanner.until(ends, parts.append)):
            return False
        scanner.arguments(dumps(_converted("".join(parts), kinds)))
        return True

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        end = lark.literal(f"{FUNCTION_END}\n{END}")
        begins = {tool.name: quoted(f"\n{FUNCTION}{tool.name}>\n") for tool in tools}
        bodies = [f"{begins[tool.name]} {_written(lark, tool)} {end}" for tool in tools]
        body = lark.rule(" | ".join(bodies))
        more = f'("\\n" {lark.literal(BEGIN)} {body})*' if many else ""
        return f"{begin} {body} {more}"


def _written(lark: Lark, tool: Tool) -> str:
    """All parameters in the schema's order; those that are not required may be missing."""
    parameters = tool.parameters
    parts = []
    for key, schema in parameters.get("properties", {}).items():
        begin, end = quoted(f"{PARAMETER}{key}>\n"), quoted(f"\n{PARAMETER_END}\n")
        schema = schema if isinstance(schema, dict) else {}
        if "string" not in _kinds(schema):
            definitions = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
            part = f"{begin} {lark.json(definitions | schema)} {end}"
        elif values := _options(schema, "enum") or [schema[name] for name in ("const",) if name in schema]:
            texts = (value if isinstance(value, str) else dumps(value) for value in values)
            part = f"{begin} ({' | '.join(map(quoted, texts))}) {end}"
        elif tool.strict and any(rule in schema for rule in _STRING_RULES):
            raise ValueError(f"{key}: this model writes strings without quotes, so their form cannot be enforced")
        else:
            part = begin + " " + lark.upto(f"\n{PARAMETER_END}\n")
        parts.append(part if key in parameters.get("required", ()) else f"({part})?")
    return " ".join(parts)


def _schema(tool: Tool, key: str) -> dict:
    schema = tool.parameters.get("properties", {}).get(key)
    return schema if isinstance(schema, dict) else {}


def _kinds(schema: dict) -> set[str]:
    """The types a value may have; of what says nothing, string."""
    kind = schema.get("type")
    kinds = {name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str)}
    for several in ("anyOf", "oneOf"):
        for option in _options(schema, several):
            kinds |= _kinds(option) if isinstance(option, dict) else set()
    if not kinds and "enum" in schema:
        kinds = {"string" if isinstance(value, str) else "other" for value in _options(schema, "enum")}
    if not kinds and ("$ref" in schema or "allOf" in schema):
        kinds = {"other"}
    return kinds or {"string"}


def _options(schema: dict, name: str) -> list:
    options = schema.get(name)
    return options if isinstance(options, list) else []


def _converted(text: str, kinds: set[str]):
    """What the text says as JSON, or in Python's words, if it is of a kind the schema knows; else the text."""
    word = text.strip()
    try:
        value = _WORDS[word] if word in _WORDS else json.loads(word)
        dumps(value)
    except (ValueError, RecursionError):
        return text
    return text if "string" in kinds and not _is_one_of(value, kinds) else value


def _is_one_of(value, kinds: set[str]) -> bool:
    kind = {dict: "object", list: "array", bool: "boolean", type(None): "null", int: "integer", float: "number"}
    name = kind.get(type(value), "string")
    return name in kinds or (name == "integer" and "number" in kinds)
