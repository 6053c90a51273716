"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, SmolLM3 and many others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import CallFormat, json_call
from .json_text import read_calls
from .lark import Lark
from .scanner import Reading, Scanner

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(CallFormat):
    name = "hermes"
    markers = (BEGIN, END)
    marker = BEGIN

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        while (yield from scanner.until((BEGIN,), scanner.say)):
            yield from read_calls(scanner, marker=BEGIN, ends=(END,))

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        end = lark.literal(f"\n{END}")
        body = lark.rule(" | ".join(f'"\\n" {json_call(lark, tool, "arguments")} {end}' for tool in tools))
        more = f'("\\n" {lark.literal(BEGIN)} {body})*' if many else ""
        return f"{begin} {body} {more}"
