"""Grammars in Lark's syntax, as llguidance reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ....base.structured import StructuredOutputsParams

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write JSON


class Lark:
    """A grammar in the making: methods give expressions, and note the rules these need.

    Args:
        special: the tokenizer's special tokens: their text is no text, but these tokens.
    """

    def __init__(self, special: Mapping[str, int]):
        self._special = special
        self._rules: list[str] = []
        self._texts = re.compile("|".join(sorted(map(re.escape, special), key=len, reverse=True)) or r"(?!)")

    def literal(self, text: str) -> str:
        """An expression for exactly this text."""
        parts, place = [], 0
        for match in self._texts.finditer(text):
            if match.start() > place:
                parts.append(json.dumps(text[place : match.start()]))
            parts.append(f"<[{self._special[match.group()]}]>")
            place = match.end()
        if place < len(text):
            parts.append(json.dumps(text[place:]))
        return " ".join(parts)

    def is_special(self, text: str) -> bool:
        return text in self._special

    def rule(self, body: str, options: str = "") -> str:
        """A new rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def lazy(self, regex: str) -> str:
        """The shortest text that matches."""
        return self.rule(f"/{slashed(regex)}/", "[lazy]")

    def upto(self, marker: str, but: str = "") -> str:
        """Any text that ends with the first `marker`. `but`: a regular expression of what it must not be."""
        if marker in self._special:
            return self.rule(f"{self.text()} {self.literal(marker)}")
        excluded = f" & ~/{slashed(but)}/" if but else ""
        return self.rule(f"/(?s:.*){slashed(re.escape(marker))}/{excluded}", "[lazy]")

    def text(self) -> str:
        """Any text without special tokens."""
        return self.rule("/(?s:.*)/")

    def json(self, schema: dict) -> str:
        """JSON of a schema, written compactly."""
        return self.rule(f"%json {json.dumps(schema | {'x-guidance': COMPACT})}")

    def form(self, form: StructuredOutputsParams) -> str:
        """A form that a request asks for by itself."""
        if form.form == "regex":
            return self.rule(f"/{slashed(form.regex)}/")
        if form.form == "choice":
            return self.rule(" | ".join(map(quoted, form.choice)))
        if form.form == "grammar":
            return self.rule(f"%lark {{\n{form.grammar}\n}}")
        schema = json.loads(form.json) if form.form == "json" else {"type": "object"}
        options: dict = {"whitespace_flexible": not form.disable_any_whitespace}
        if form.whitespace_pattern is not None:
            options["whitespace_pattern"] = form.whitespace_pattern
        schema = {} if schema is True else {"not": {}} if schema is False else schema
        return self.rule(f"%json {json.dumps(schema | {'x-guidance': options})}")

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])


_AWKWARD = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}  # what ends an expression, or may not stand in it


def slashed(regex: str) -> str:
    """A regular expression as it stands between slashes."""
    return re.sub(r"\\.|/|\n", lambda match: _AWKWARD.get(match.group(), match.group()), regex, flags=re.DOTALL)


def quoted(text: str) -> str:
    """An expression for text that has no special tokens in it."""
    return json.dumps(text)
