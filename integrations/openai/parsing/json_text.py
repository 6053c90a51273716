"""JSON that comes in pieces: where a value ends, and calls written as JSON objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Literal

from .scanner import SPACE, Reading, Scanner

Outcome = Literal["none", "complete", "broken"]
MAX_DEPTH = 64
_CLOSERS = {"{": "}", "[": "]"}
_OUTSIDE = frozenset('{}[]",:+-.0123456789eEtrufalsn' + SPACE)  # what JSON has outside its strings
_PLAIN = re.compile(r'[^"\\]*')
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES, _ARGUMENTS = ("name",), ("arguments", "parameters")
_FIRST = (*_NAMES, *_ARGUMENTS, "type", "id", "function")  # keys a call may begin with


class JSONEnd:
    """Finds the end of one JSON value: brackets must match, and nothing strange may stand outside of strings.

    Attributes:
        done: the value is complete.
        wrong: it cannot be JSON; what follows the fault was not looked at.
    """

    def __init__(self):
        self.done = self.wrong = False
        self._closers: list[str] = []
        self._in_string = self._escaped = self._begun = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the value."""
        place = 0
        while place < len(text) and not (self.done or self.wrong):
            if self._in_string:
                place = self._string(text, place)
            elif self._outside(text[place]):
                place += 1
        return place

    def _string(self, text: str, place: int) -> int:
        if self._escaped:
            self._escaped = False
            return place + 1
        place = _PLAIN.match(text, place).end()
        if place == len(text):
            return place
        if text[place] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self.done = not self._closers
        return place + 1

    def _outside(self, character: str) -> bool:
        """Take a character outside of strings; False if it is not the value's."""
        if not self._closers and self._begun and character in SPACE + ",]}":  # the end of a number or a word
            self.done = True
            return False
        if character not in _OUTSIDE or (not self._begun and character in SPACE + ",:]}"):
            self.wrong = True
            return False
        self._begun = True
        if character == '"':
            self._in_string = True
        elif character in _CLOSERS:
            self._closers.append(_CLOSERS[character])
            self.wrong = len(self._closers) > MAX_DEPTH
        elif character in "}]":
            self.wrong = self._closers.pop() != character
            self.done = not self._closers
        return not self.wrong


def read_value(scanner: Scanner, emit: Callable[[str], None]) -> Reading[bool]:
    """Pass the text of one JSON value to `emit`; False if it breaks off, or is none."""
    end = JSONEnd()
    while not (end.done or end.wrong) and (yield from scanner.more()):
        count = end.scan(scanner.unread)
        if count:
            emit(scanner.advance(count))
    return end.done


def read_string(scanner: Scanner) -> Reading[str | None]:
    """The value of a JSON string that comes next; None if none does."""
    if (yield from scanner.peek()) != '"':
        return None
    parts: list[str] = []
    if not (yield from read_value(scanner, parts.append)):
        return None
    try:
        return json.loads("".join(parts), strict=False)
    except ValueError:
        return None


def read_call(scanner: Scanner, *, bare: bool = False) -> Reading[Outcome]:
    """Read a call written as `{"name": ..., "arguments": {...}}`: keys in any order, "parameters" will do, too.

    Arguments are passed on as they come, as soon as the name is known.

    Args:
        bare: no marker said that a call comes, so it must look like one from its first key, and have arguments.
    """
    before = scanner.num_calls
    object_ = _CallObject(scanner, bare)
    complete = yield from object_.read()
    if complete and scanner.num_calls == before and object_.name is not None and not bare:
        object_.begin("{}")  # without arguments
    if scanner.num_calls == before:
        return "none"
    return "complete" if complete else "broken"


def read_calls(
    scanner: Scanner, *, marker: str = "", ends: Sequence[str] = (), between: str = ",", bare: bool = False
) -> Reading[None]:
    """Read calls as JSON objects: one, several one after another, or a list of them.

    What is no call is text. A call that breaks off keeps what the model wrote in its arguments.

    Args:
        marker: what announced them, already taken; said where no call follows.
        ends: what closes them.
        between: what may stand between two, beside white space.
    """
    scanner.keep()
    yield from scanner.take_while(SPACE)
    yield from scanner.skip("[")
    yield from scanner.take_while(SPACE)
    while True:
        outcome = yield from read_call(scanner, bare=bare)
        text = scanner.kept()
        if outcome == "none":
            scanner.say(scanner.visible(marker + text))
            return
        if outcome == "broken":
            yield from scanner.until(ends, scanner.arguments)
            return
        marker = ""
        scanner.keep()
        yield from scanner.take_while(SPACE + between + "]")
        for end in ends:
            if (yield from scanner.skip(end)):
                scanner.kept()
                return
        if (yield from scanner.peek()) != "{":
            scanner.kept()
            return


class _CallObject:
    """One object on its way. `name` and `held` wait for each other."""

    def __init__(self, scanner: Scanner, bare: bool):
        self._scanner, self._bare = scanner, bare
        self.name: str | None = None
        self._held: str | None = None

    def begin(self, arguments: str = "") -> None:
        self._scanner.call(self.name)
        self._scanner.arguments(arguments)

    def read(self) -> Reading[bool]:
        """Up to its closing bracket; False where it breaks off."""
        scanner = self._scanner
        if not (yield from scanner.skip("{")):
            return False
        keys: set[str] = set()
        while True:
            yield from scanner.take_while(SPACE)
            key = yield from read_string(scanner)
            if key is None or key in keys or (self._bare and not keys and key not in _FIRST):
                return False
            keys.add(key)
            yield from scanner.take_while(SPACE)
            if not (yield from scanner.skip(":")):
                return False
            yield from scanner.take_while(SPACE)
            if not (yield from self._value(key)):
                return False
            yield from scanner.take_while(SPACE)
            if (yield from scanner.skip("}")):
                return True
            if not (yield from scanner.skip(",")):
                return False

    def _value(self, key: str) -> Reading[bool]:
        first = yield from self._scanner.peek()
        if first == '"' and (key in _NAMES or key == "function") and self.name is None:
            return (yield from self._read_name())
        if key in _ARGUMENTS:
            return first in ("{", '"') and self._held is None and (yield from self._read_arguments(first))
        return (yield from read_value(self._scanner, lambda text: None))

    def _read_name(self) -> Reading[bool]:
        name = yield from read_string(self._scanner)
        if name not in self._scanner.names:
            return False
        self.name = name
        if self._held is not None:
            self.begin(self._held)
        return True

    def _read_arguments(self, first: str) -> Reading[bool]:
        """An object, or an object's JSON text in a string, which some models write."""
        if first == "{" and self.name is not None:
            self._held = ""
            self.begin()
            return (yield from read_value(self._scanner, self._scanner.arguments))
        parts: list[str] = []
        if not (yield from read_value(self._scanner, parts.append)):
            return False
        text = "".join(parts)
        if first == '"':
            text = _unquoted(text)
        if text is None:
            return False
        self._held = text
        if self.name is not None:
            self.begin(text)
        return True


def dumps(value) -> str:
    """JSON text that any encoding takes: halves of surrogate pairs are written as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value, allow_nan=False)


def _unquoted(text: str) -> str | None:
    """The object whose JSON text is the string of this JSON text."""
    try:
        inner = json.loads(text, strict=False)
        return inner if isinstance(json.loads(inner), dict) else None
    except (ValueError, RecursionError):
        return None
