"""Python literals and calls that come in pieces, read by hand: nothing is ever evaluated."""

from __future__ import annotations

import math
import string

from .scanner import SPACE, Reading, Scanner

MAX_DEPTH = 64
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_ESCAPES |= {character: character for character in "\\'\"/"}
_HEX = {"x": 2, "u": 4, "U": 8}
_NUMBER = string.digits + "+-.eE_"
_NAME = string.ascii_letters + string.digits + "_-."


class NotPython(Exception):
    """What comes is not a literal, or not a call."""


def read_call(scanner: Scanner) -> Reading[tuple[str, dict]]:
    """name(key=value, ...) as the name and the values. Raises NotPython, also where the text ends before it."""
    name = yield from scanner.take_while(_NAME)
    if name not in scanner.names:
        raise NotPython
    yield from _expect(scanner, "(")
    values: dict = {}
    yield from scanner.take_while(SPACE)
    while (yield from scanner.peek()) != ")":
        key = yield from scanner.take_while(_NAME)
        yield from scanner.take_while(SPACE)
        if not key or key in values:
            raise NotPython
        yield from _expect(scanner, "=")
        values[key] = yield from read_literal(scanner)
        yield from scanner.take_while(SPACE)
        if not (yield from _comma(scanner, ")")):
            break
    yield from _expect(scanner, ")")
    return name, values


def read_literal(scanner: Scanner, depth: int = 0) -> Reading[object]:
    """A string, number, True, False, None, list, tuple (which becomes a list) or dict. Raises NotPython."""
    if depth > MAX_DEPTH:
        raise NotPython
    yield from scanner.take_while(SPACE)
    first = yield from scanner.peek()
    if first in ("'", '"'):
        return (yield from _string(scanner))
    if first in ("[", "("):
        return (yield from _list(scanner, depth))
    if first == "{":
        return (yield from _dict(scanner, depth))
    if first and first in _NUMBER:
        return _number((yield from scanner.take_while(_NUMBER)))
    word = yield from scanner.take_while(string.ascii_letters, 8)
    if word not in WORDS:
        raise NotPython
    return WORDS[word]


def _list(scanner: Scanner, depth: int) -> Reading[list]:
    close = "]" if scanner.advance(1) == "[" else ")"
    items = []
    yield from scanner.take_while(SPACE)
    while (yield from scanner.peek()) != close:
        items.append((yield from read_literal(scanner, depth + 1)))
        if not (yield from _comma(scanner, close)):
            break
    yield from _expect(scanner, close)
    return items


def _dict(scanner: Scanner, depth: int) -> Reading[dict]:
    scanner.advance(1)
    values: dict = {}
    yield from scanner.take_while(SPACE)
    while (yield from scanner.peek()) != "}":
        key = yield from read_literal(scanner, depth + 1)
        if not isinstance(key, str):
            raise NotPython
        yield from scanner.take_while(SPACE)
        yield from _expect(scanner, ":")
        values[key] = yield from read_literal(scanner, depth + 1)
        if not (yield from _comma(scanner, "}")):
            break
    yield from _expect(scanner, "}")
    return values


def _comma(scanner: Scanner, close: str) -> Reading[bool]:
    """Whether a comma comes, and white space; else `close` must."""
    yield from scanner.take_while(SPACE)
    if not (yield from scanner.skip(",")):
        if (yield from scanner.peek()) != close:
            raise NotPython
        return False
    yield from scanner.take_while(SPACE)
    return True


def _expect(scanner: Scanner, character: str) -> Reading[None]:
    if not (yield from scanner.skip(character)):
        raise NotPython


def _string(scanner: Scanner) -> Reading[str]:
    quote = scanner.advance(1)
    parts: list[str] = []
    while True:
        found = yield from scanner.until((quote, "\\"), parts.append)
        if not found:
            raise NotPython
        if found == quote:
            return "".join(parts)
        parts.append((yield from _escape(scanner)))


def _escape(scanner: Scanner) -> Reading[str]:
    if not (yield from scanner.more()):
        raise NotPython
    kind = scanner.advance(1)
    if kind not in _HEX:
        return _ESCAPES.get(kind, "\\" + kind)
    digits = yield from scanner.take_while(string.hexdigits, _HEX[kind])
    if len(digits) < _HEX[kind] or int(digits, 16) > 0x10FFFF:
        raise NotPython
    return chr(int(digits, 16))


def _number(text: str) -> int | float:
    try:
        number = int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
    except (ValueError, OverflowError):
        raise NotPython from None
    if isinstance(number, float) and not math.isfinite(number):
        raise NotPython
    return number
