"""{"name": ..., "parameters": {...}}, with or without <|python_tag|> before it: Llama 3.1 and later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import CallFormat, json_call
from .json_text import read_calls
from .lark import Lark
from .scanner import SPACE, Reading, Scanner

MARKERS = ("<|python_tag|>", "<|python_start|>")
END = "<|python_end|>"  # Llama 4 puts text between the two, and calls behind them


class Llama3JSON(CallFormat):
    name = "llama3_json"
    markers = (*MARKERS, END)
    opening = "{"

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        scanner.say((yield from scanner.take_while(SPACE)))
        if (yield from scanner.peek()) == "{":
            yield from read_calls(scanner, between=";,", bare=True)
        while marker := (yield from scanner.until(self.markers, scanner.say)):
            yield from read_calls(scanner, marker=marker, ends=(END,), between=";,")

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        call = lark.rule(" | ".join(json_call(lark, tool, "parameters") for tool in tools))
        return f'{call} ("; " {call})*' if many else call
