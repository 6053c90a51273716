"""[name(key="value"), ...]: Llama 3.2, Llama 4 and LFM2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import CallFormat
from .json_text import dumps
from .lark import Lark, quoted
from .python_text import NotPython, read_call
from .scanner import SPACE, Reading, Scanner


class Pythonic(CallFormat):
    """A list of Python calls, at the beginning of an answer or between two markers. A call shows when it is whole."""

    name = "pythonic"
    begin, end = "<|python_start|>", "<|python_end|>"
    opening = "["

    @property
    def markers(self) -> tuple[str, ...]:
        return self.begin, self.end

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        blank = yield from scanner.take_while(SPACE)
        scanner.say(blank)
        if self.marker is None and (yield from scanner.peek()) == "[":
            yield from self._calls(scanner, "")
        while (yield from scanner.until((self.begin,), scanner.say)):
            yield from self._calls(scanner, self.begin)

    def _calls(self, scanner: Scanner, marker: str) -> Reading[None]:
        scanner.keep()
        try:
            yield from scanner.take_while(SPACE)
            if not (yield from scanner.skip("[")):
                raise NotPython
            while True:
                yield from scanner.take_while(SPACE)
                name, values = yield from read_call(scanner)
                text = dumps(values)
                marker = ""
                scanner.kept()
                scanner.call(name)
                scanner.arguments(text)
                scanner.keep()
                yield from scanner.take_while(SPACE)
                if not (yield from scanner.skip(",")):
                    break
            yield from scanner.skip("]")
            yield from scanner.take_while(SPACE)
            yield from scanner.skip(self.end)
            scanner.kept()
        except (NotPython, ValueError):
            scanner.say(scanner.visible(marker + scanner.kept()))

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        """Values are written as JSON, which `read` takes, too."""
        call = lark.rule(" | ".join(self._written(lark, tool) for tool in tools))
        more = f'(", " {call})*' if many else ""
        end = lark.literal(self.end) if self.marker else ""
        return f'{begin if self.marker else ""} "[" {call} {more} "]" {end}'

    def _written(self, lark: Lark, tool: Tool) -> str:
        """All arguments in the schema's order; those that are not required may be missing."""
        parameters = tool.parameters
        definitions = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        required = parameters.get("required", ())
        first = quoted(f"{tool.name}(")
        rest = '")"'
        parts = []
        for key, schema in parameters.get("properties", {}).items():
            schema = definitions | schema if isinstance(schema, dict) else {}
            parts.append((key in required, f"{quoted(f'{key}=')} {lark.json(schema)}"))
        return f"{first} {_listed(lark, parts)} {rest}"


def _listed(lark: Lark, parts: list[tuple[bool, str]]) -> str:
    """Parts with commas between them, of which some may be missing."""
    after = begun = ""  # what may follow when something came before, and when nothing did
    for needed, part in reversed(parts):
        following = lark.rule(f'", " {part} {after}') if after else lark.rule(f'", " {part}')
        opening = lark.rule(f"{part} {after}")
        if needed:
            after, begun = following, opening
        else:
            after = f"({following} | {after})" if after else f"{following}?"
            begun = f"({opening} | {begun})" if begun else f"{opening}?"
    return begun


class LFM2(Pythonic):
    name = "lfm2"
    begin, end = "<|tool_call_start|>", "<|tool_call_end|>"
    marker = begin
