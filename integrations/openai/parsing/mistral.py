"""[TOOL_CALLS] before a JSON list of calls, or before each name[ARGS]{...}: Mistral's models."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import NAME_CHARACTERS, CallFormat, json_call
from .json_text import read_calls, read_value
from .lark import Lark, quoted
from .scanner import SPACE, Reading, Scanner

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ID_LENGTH = 9  # the templates refuse ids that are not nine letters and digits
_LETTERS = string.ascii_letters + string.digits


class Mistral(CallFormat):
    name = "mistral"
    markers = (BEGIN, ID, ARGUMENTS)
    marker = BEGIN

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        while (yield from scanner.until((BEGIN,), scanner.say)):
            blank = yield from scanner.take_while(SPACE)
            if (yield from scanner.peek()) in ("[", "{"):
                yield from read_calls(scanner, marker=BEGIN + blank)
            else:
                yield from self._named(scanner, BEGIN + blank)

    def _named(self, scanner: Scanner, marker: str) -> Reading[None]:
        """name[ARGS]{...} or name[CALL_ID]id[ARGS]{...}"""
        scanner.keep()
        name = yield from scanner.take_while(NAME_CHARACTERS)
        identity = (yield from scanner.take_while(_LETTERS)) if (yield from scanner.skip(ID)) else None
        yield from scanner.skip(ARGUMENTS)  # some vocabularies have no token for it, and no text either
        yield from scanner.take_while(SPACE)
        first = yield from scanner.peek()
        text = scanner.kept()
        if name not in scanner.names or first != "{":
            scanner.say(scanner.visible(marker + text))
            return
        scanner.call(name, identity)
        if not (yield from read_value(scanner, scanner.arguments)):
            yield from scanner.until((), scanner.arguments)

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        if lark.is_special(ARGUMENTS):
            separator = lark.literal(ARGUMENTS)
            call = lark.rule(
                " | ".join(f"{quoted(tool.name)} {separator} {lark.json(tool.parameters)}" for tool in tools)
            )
            more = f"({lark.literal(BEGIN)} {call})*" if many else ""
            return f"{begin} {call} {more}"
        call = lark.rule(" | ".join(json_call(lark, tool, "arguments") for tool in tools))
        more = f'(", " {call})*' if many else ""
        return f'{begin} ("[" | " [") {call} {more} "]"'

    def new_id(self) -> str:
        return "".join(secrets.choice(_LETTERS) for _ in range(ID_LENGTH))
