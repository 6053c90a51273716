"""Reasoning between two tags: <think> and </think>, or Mistral's [THINK] and [/THINK]."""

from __future__ import annotations

import re

from .formats import ReasoningFormat, State
from .lark import Lark
from .scanner import SPACE, Reading, Scanner


class Think(ReasoningFormat):
    """A model that thinks between tags, or not at all. The template may have opened the first tag for it.

    Line breaks beside the tags are the templates', not the model's.
    """

    name = "think"
    begin, end = "<think>", "</think>"
    without_tag: State = "may come"  # what is known when the prompt says nothing

    @property
    def markers(self) -> tuple[str, ...]:
        return self.begin, self.end

    def state(self, prompt: str, continued: str | None) -> State:
        if continued is not None and continued.strip(SPACE):
            return "begun" if continued.rfind(self.begin) > continued.rfind(self.end) else "ended"
        prompt = prompt.rstrip(SPACE)
        return "begun" if prompt.endswith(self.begin) else "ended" if prompt.endswith(self.end) else self.without_tag

    def read(self, scanner: Scanner, state: State) -> Reading[None]:
        if state == "ended":
            return
        blank = yield from scanner.take_while(SPACE)
        opened = yield from scanner.skip(self.begin)
        if state == "may come" and not opened:
            scanner.say(blank)
            return
        scanner.turn()
        scanner.think("" if opened else blank.lstrip("\n"))
        yield from scanner.take_while("\n")
        lines = ""

        def think(text: str) -> None:
            nonlocal lines
            text = lines + text
            bare = text.rstrip("\n")
            lines = text[len(bare) :]
            scanner.think(bare)

        if not (yield from scanner.until((self.end,), think)):
            scanner.think(lines)
            return
        scanner.turn()
        yield from scanner.take_while("\n")

    def expression(self, lark: Lark, state: State) -> str:
        if state == "ended":
            return ""
        lines = '("\\n\\n" | "\\n")?'
        if state != "may come":
            return f"{lark.upto(self.end)} {lines}"
        if lark.is_special(self.begin):
            return f"({lark.literal(self.begin)} {lark.upto(self.end)} {lines})?"
        # in one, so that it ends before a text that could go on
        return f"({lark.lazy(f'{re.escape(self.begin)}(?s:.*){re.escape(self.end)}')} {lines})?"

    def held(self, state: State) -> str:
        return rf"\s*{re.escape(self.begin)}(?s:.*)" if state == "may come" else ""


class DeepSeekR1(Think):
    """A model that always thinks, and may leave out the first tag."""

    name = "deepseek_r1"
    without_tag = "must come"


class MistralThink(Think):
    name = "mistral"
    begin, end = "[THINK]", "[/THINK]"
