"""What every way of writing reasoning and calls has in common."""

from __future__ import annotations

import json
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

from ..tools import Tool
from .lark import Lark, quoted
from .scanner import Reading, Scanner, new_call_id

State = Literal["begun", "ended", "must come", "may come"]
NAME_CHARACTERS = string.ascii_letters + string.digits + "_-"


def json_call(lark: Lark, tool: Tool, arguments: str) -> str:
    """An expression for one call as a JSON object. The schema stays a whole of its own: it may refer to its parts."""
    begin = f'{{"name": {json.dumps(tool.name)}, "{arguments}": '
    return f'{quoted(begin)} {lark.json(tool.parameters)} "}}"'


class CallFormat(ABC):
    """How a model writes calls of functions. Instances keep nothing of an answer.

    Attributes:
        name: what it is chosen by.
        markers: texts that are special tokens in some vocabularies, which the scanner has to see.
        marker: the text every call begins with, so that no other text can be the beginning of one; None if none does.
        opening: without a marker, the character that calls begin with.
        reasons: whether it reads reasoning, too, so that no other format may.
    """

    name: str
    markers: tuple[str, ...] = ()
    marker: str | None = None
    opening = ""
    reasons = False

    @abstractmethod
    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        """Read to the end of the text, which follows `prompt`."""

    def calls(self, lark: Lark, tools: Sequence[Tool], begin: str, many: bool) -> str | None:
        """An expression for one call, or (`many`) for one and more; None if there is no grammar of this format.

        Args:
            begin: an expression for what ends with the marker; it stands for the first call's.
        """
        return None

    def free(self, lark: Lark, tools: Sequence[Tool], but: str) -> str | None:
        """An expression for text and calls in any order, where calls are right; None as for `calls`.

        Args:
            but: a regular expression of text that may hold the marker and yet no call.
        """
        if self.marker is not None:
            call = self.calls(lark, tools, lark.upto(self.marker, but), many=False)
            return call and f"({call})* {lark.text()}"
        calls = self.calls(lark, tools, "", many=True)
        other = lark.rule(r"/[ \t\r\n]*[^ \t\r\n" + re.escape(self.opening) + r"](?s:.*)/")
        return calls and f"({calls} | {other})"

    def lead(self, lark: Lark) -> str:
        """An expression for what comes before calls that must come: the reasoning, if this format reads it."""
        return ""

    def saying(self, lark: Lark, content: str) -> str | None:
        """An expression for an answer without calls whose content is `content`; None as for `calls`."""
        return content

    def new_id(self) -> str:
        return new_call_id()


class ReasoningFormat(ABC):
    """How a model writes what it thinks before it answers. Instances keep nothing of an answer.

    Attributes:
        name, markers: see CallFormat.
    """

    name: str
    markers: tuple[str, ...] = ()

    @abstractmethod
    def state(self, prompt: str, continued: str | None) -> State:
        """What is known of the reasoning when `prompt` has been read.

        Args:
            continued: the answer's beginning, if the prompt ends with one.
        """

    @abstractmethod
    def read(self, scanner: Scanner, state: State) -> Reading[None]:
        """Read up to the end of the reasoning."""

    @abstractmethod
    def expression(self, lark: Lark, state: State) -> str:
        """An expression for what comes before the answer: the reasoning, if any."""

    @abstractmethod
    def held(self, state: State) -> str:
        """A regular expression of text that begins with reasoning; "" if none may come where `expression` ended."""
