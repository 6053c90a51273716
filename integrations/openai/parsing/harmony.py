"""GPT-OSS: messages of several channels: analysis is reasoning, final is the answer, commentary has the calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..tools import Tool
from .formats import CallFormat
from .json_text import read_value
from .lark import Lark, quoted
from .scanner import SPACE, Reading, Scanner

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")


class Harmony(CallFormat):
    """The prompt ends with `<|start|>assistant`; what follows is the rest of a header, its message, and maybe more."""

    name = "harmony"
    markers = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    marker = CHANNEL
    reasons = True

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        begun: set[bool] = set()
        while (yield from scanner.more()):
            scanner.keep()
            yield from scanner.take_while(SPACE)
            if not (yield from self._at_header(scanner)):
                scanner.say(scanner.kept())  # a model that writes no headers just talks
                yield from scanner.until(ENDS, scanner.say)
                continue
            complete = yield from scanner.until((MESSAGE,), lambda text: None)
            header = scanner.kept()
            if not complete:  # cut off, unless it only looked like a header
                scanner.say("" if CHANNEL in header or START in header else header)
                return
            channel, to = _CHANNEL.search(header), _TO.search(header)
            if to is not None and to.group(1) in scanner.names and (yield from scanner.peek()) == "{":
                yield from self._call(scanner, to.group(1))
                continue
            thinks = channel is not None and channel.group(1) == "analysis"
            yield from self._message(scanner, thinks, "\n" if thinks in begun else "")
            begun.add(thinks)

    def _at_header(self, scanner: Scanner) -> Reading[bool]:
        for beginning in ("to=", CHANNEL, START):
            if (yield from scanner.skip(beginning)):
                return True
        return False

    def _call(self, scanner: Scanner, name: str) -> Reading[None]:
        scanner.call(name)
        if (yield from read_value(scanner, scanner.arguments)):
            yield from scanner.take_while(SPACE)
            yield from scanner.until(ENDS, scanner.say)
        else:
            yield from scanner.until(ENDS, scanner.arguments)

    def _message(self, scanner: Scanner, thinks: bool, separator: str) -> Reading[None]:
        if not thinks:
            scanner.say(separator)
            yield from scanner.until(ENDS, scanner.say)
            return
        scanner.turn()
        scanner.think(separator)
        yield from scanner.until(ENDS, scanner.think)
        scanner.turn()

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str:
        """One: the token behind a call ends the answer."""
        header = lark.literal(f" {CONSTRAIN}json{MESSAGE}")
        begins = {tool.name: quoted(f"commentary to=functions.{tool.name}") for tool in tools}
        bodies = (f"{begins[tool.name]} {header} {lark.json(tool.parameters)}" for tool in tools)
        return f"{begin} {lark.rule(' | '.join(bodies))}"

    def free(self, lark: Lark, tools: Sequence[Tool], but: str) -> str:
        call = self.calls(lark, tools, lark.literal(CHANNEL), many=False)
        others = f"({self._other(lark, 'analysis')} | {self._other(lark, 'commentary')})*"
        return f"{others} ({call} | {self.saying(lark, lark.text())})"

    def lead(self, lark: Lark) -> str:
        return f"({self._other(lark, 'analysis')})?"

    def saying(self, lark: Lark, content: str) -> str:
        return f"{lark.literal(f'{CHANNEL}final{MESSAGE}')} {content}"

    def _other(self, lark: Lark, channel: str) -> str:
        """A message that is not the last."""
        header = lark.literal(f"{CHANNEL}{channel}{MESSAGE}")
        return f"{header} {lark.upto('<|end|>')} {lark.literal(f'{START}assistant')}"
