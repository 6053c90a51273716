"""transformers' own parser, for tokenizers that carry a description of their model's answers (`response_template`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

from ..tools import Tool
from .formats import CallFormat
from .json_text import dumps
from .lark import Lark
from .scanner import Reading, Scanner

_REASONING = ("thinking", "reasoning", "reasoning_content")
_CALLS = "tool_calls"


class ResponseTemplate(CallFormat):
    """Text and reasoning come as they are written, a call when it is whole. It describes how to read, not how to write.

    Args:
        tokenizer: one with a `response_template`.
    """

    name = "transformers"
    reasons = True

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        described = re.sub(r"\\\\(.)", r"\1", json.dumps(tokenizer.response_template, ensure_ascii=False))
        tokens = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.markers = tuple(token for token in tokens if token in described)

    def saying(self, lark: Lark, content: str) -> str | None:
        """How an answer begins after its reasoning is not described."""
        reasons = any(name in self._tokenizer.response_template["fields"] for name in _REASONING)
        return None if reasons else content

    def read(self, scanner: Scanner, tools: Mapping[str, Tool], prompt: str) -> Reading[None]:
        listed = [tool.for_template() for tool in tools.values()]
        region = _Region(scanner)
        try:
            parser = self._tokenizer.get_response_parser(prefix=prompt, tools=listed)
            region.hear(event for event in parser.initial_events if event["type"] != "region_chunk")
            while (yield from scanner.more()):
                # a character at a time: where it fails must not depend on how the text was cut up
                region.hear(parser.feed(scanner.advance(1)))
            region.hear(parser.finalize()[1])
        except Exception:  # what a model writes may be nothing the description foresees: any error of its parser
            region.give_up()
            yield from scanner.plain()


class _Region:
    """The part of the message that is being written."""

    def __init__(self, scanner: Scanner):
        self._scanner = scanner
        self._body: list[str] = []  # of a part that shows when it is whole

    def hear(self, events: Iterable[dict]) -> None:
        for event in events:
            if event["type"] == "region_chunk":
                self._chunk(event)
                continue
            self._body.clear()
            if event["field"] in _REASONING:
                self._scanner.turn()
            elif event["field"] == _CALLS and event["type"] == "region_close":
                for name, arguments in _calls(event["value"]):
                    if name in self._scanner.names:
                        self._scanner.call(name)
                        self._scanner.arguments(arguments)

    def _chunk(self, event: dict) -> None:
        if event["field"] in _REASONING:
            self._scanner.think(event["text"])
        elif event["dirty"]:
            self._body.append(event["text"])
        elif event["field"] == "content":
            self._scanner.say(event["text"])

    def give_up(self) -> None:
        """What would have been something is just text."""
        self._scanner.say(self._scanner.visible("".join(self._body)))


def _calls(value) -> Iterator[tuple[str, str]]:
    """Names and arguments, of one call or a list of them."""
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        yield function["name"], arguments if isinstance(arguments, str) else dumps(arguments)
