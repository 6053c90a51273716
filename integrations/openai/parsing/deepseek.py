"""<｜tool▁calls▁begin｜>...: DeepSeek V3 and R1, whose arguments stand in a fence, and V3.1, whose do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import NAME_CHARACTERS, CallFormat
from .json_text import read_value
from .lark import Lark, quoted
from .scanner import SPACE, Reading, Scanner

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE, FENCE_END = "```json\n", "\n```"


class DeepSeekV3(CallFormat):
    """function<｜tool▁sep｜>name, then the arguments in a fence."""

    name = "deepseek_v3"
    markers = (CALLS, CALLS_END, CALL, SEPARATOR, CALL_END)
    marker = CALLS

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        """Both kinds: they cannot be taken for each other."""
        while marker := (yield from scanner.until((CALLS, CALL), scanner.say)):
            if marker == CALLS:
                yield from scanner.take_while(SPACE)
                continue  # what comes before the first call is text
            yield from self._call(scanner)
            yield from scanner.take_while(SPACE)
            yield from scanner.skip(CALLS_END)

    def _call(self, scanner: Scanner) -> Reading[None]:
        scanner.keep()
        name = yield from scanner.take_while(NAME_CHARACTERS)
        separated = yield from scanner.skip(SEPARATOR)
        if separated and name == "function" and (yield from scanner.peek()) != "{":
            name = yield from scanner.take_while(NAME_CHARACTERS)
            yield from scanner.take_while(SPACE)
            yield from scanner.skip(FENCE)
        yield from scanner.take_while(SPACE)
        first = yield from scanner.peek()
        text = scanner.kept()
        if not separated or name not in scanner.names or first != "{":
            scanner.say(scanner.visible(CALL + text))
            return
        scanner.call(name)
        if not (yield from read_value(scanner, scanner.arguments)):
            yield from scanner.until((CALL_END,), scanner.arguments)
            return
        yield from scanner.take_while(SPACE)
        yield from scanner.skip(FENCE_END.strip())
        yield from scanner.take_while(SPACE)
        yield from scanner.skip(CALL_END)

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        call = lark.rule(" | ".join(self._written(lark, tool) for tool in tools))
        more = f'("\\n"? {call})*' if many else ""
        return f"{begin} {call} {more} {lark.literal(CALLS_END)}"

    def _written(self, lark: Lark, tool: Tool) -> str:
        begin = f"{lark.literal(CALL)} {quoted('function')} {lark.literal(SEPARATOR)}"
        fence = quoted(f"{tool.name}\n{FENCE}")
        return f"{begin} {fence} {lark.json(tool.parameters)} {quoted(FENCE_END)} {lark.literal(CALL_END)}"


class DeepSeekV31(DeepSeekV3):
    """name<｜tool▁sep｜>arguments"""

    name = "deepseek_v31"

    def _written(self, lark: Lark, tool: Tool) -> str:
        begin = f"{lark.literal(CALL)} {quoted(tool.name)} {lark.literal(SEPARATOR)}"
        return f"{begin} {lark.json(tool.parameters)} {lark.literal(CALL_END)}"
