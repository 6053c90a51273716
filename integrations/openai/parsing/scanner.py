"""Reads text that comes in pieces, and says what it means as it becomes clear.

A format is a generator: it asks the scanner for characters and pauses (yields) where there are none yet. What it does
depends on the characters alone, so however a text is cut up, the same pieces come of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

from ..pieces import CallArguments, CallBegins, Content, Piece, Reasoning, merged

T = TypeVar("T")
Reading = Generator[None, None, T]
SPACE = " \t\r\n"


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Scanner:
    """The text of one answer, and the pieces found in it.

    Args:
        names: of the functions that may be called. A call of another is no call.
        one_call: calls after the first are left out.
        hidden: texts that users never see, as they are special tokens.
        new_id: makes the ids of calls.
    """

    def __init__(
        self,
        names: Collection[str] = (),
        *,
        one_call: bool = False,
        hidden: Sequence[str] = (),
        new_id: Callable[[], str] = new_call_id,
    ):
        self.names, self._hidden = names, tuple(hidden)
        self._one_call, self._new_id = one_call, new_id
        self._text, self._place, self._ended = "", 0, False
        self._passed = 0  # characters before `_text`
        self._kept: list[str] | None = None
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._blank = ""  # white space that is dropped if a call comes next
        self._said = False  # whether there was text since the beginning or the last call
        self.turns: list[int] = []  # characters after which reasoning began, ended, began ...

    # what comes in

    def feed(self, text: str) -> None:
        self._passed += self._place
        self._text, self._place = self._text[self._place :] + text, 0

    def end(self) -> None:
        self._ended = True

    @property
    def unread(self) -> str:
        return self._text[self._place :]

    def more(self) -> Reading[bool]:
        """Wait until there is something unread; False if the text has ended."""
        while self._place == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, which stays; "" at the end."""
        return self._text[self._place] if (yield from self.more()) else ""

    def advance(self, count: int) -> str:
        """Take `count` characters, which are there."""
        taken = self._text[self._place : self._place + count]
        self._place += count
        if self._kept is not None:
            self._kept.append(taken)
        return taken

    def skip(self, literal: str) -> Reading[bool]:
        """Whether the text goes on with `literal`, which is taken then. Else it stays."""
        while True:
            unread = self._text[self._place : self._place + len(literal)]
            if unread == literal:
                self.advance(len(literal))
                return True
            if self._ended or not literal.startswith(unread):
                return False
            yield

    def take_while(self, characters: str, most: int = 1 << 20) -> Reading[str]:
        """The longest run of `characters` that comes next."""
        taken: list[str] = []
        count = 0
        while count < most and (yield from self.more()):
            text, place = self._text, self._place
            end = min(len(text), place + most - count)
            stop = next((i for i in range(place, end) if text[i] not in characters), end)
            taken.append(self.advance(stop - place))
            count += stop - place
            if stop < end:
                break
        return "".join(taken)

    def until(self, markers: Sequence[str], emit: Callable[[str], None]) -> Reading[str]:
        """Pass text to `emit` up to the first of `markers`, which is taken and returned; "" at the end of the text.

        Only what may be the beginning of a marker is held back. Hidden texts are left out.
        """
        sought = (*markers, *(hidden for hidden in self._hidden if hidden not in markers))
        while (yield from self.more()):
            unread = self.unread
            found = min(((place, m) for m in sought if (place := unread.find(m)) >= 0), default=None)
            safe = len(unread) if self._ended else _safe(unread, sought)
            if found is not None and found[0] <= safe:
                place, marker = found
                if place:
                    emit(self.advance(place))
                self.advance(len(marker))
                if marker in markers:
                    return marker
                continue
            if safe:
                emit(self.advance(safe))
            if safe < len(unread):
                yield
        return ""

    def keep(self) -> None:
        """From here on, remember what is taken, until `kept`."""
        self._kept = []

    def kept(self) -> str:
        """What was taken since `keep`."""
        kept, self._kept = "".join(self._kept or ()), None
        return kept

    def visible(self, text: str) -> str:
        """`text` without what is hidden."""
        for hidden in self._hidden:
            text = text.replace(hidden, "")
        return text

    def plain(self) -> Reading[None]:
        """All text to the end is for the user."""
        self._said = True
        blank, self._blank = self._blank, ""
        self.say(blank)
        yield from self.until((), self.say)

    # what comes of it

    def say(self, text: str) -> None:
        """Text for the user. White space alone waits: before a call it belongs to the call's form."""
        if not self._said:
            self._blank += text
            if not text.strip(SPACE):
                return
            text, self._blank, self._said = self._blank, "", True
        if text:
            self._pieces.append(Content(text))

    def think(self, text: str) -> None:
        if text:
            self._pieces.append(Reasoning(text))

    def call(self, name: str, id: str | None = None) -> None:
        self._blank, self._said = "", False
        self._num_calls += 1
        if self._listening:
            self._pieces.append(CallBegins(self._num_calls - 1, id or self._new_id(), name))

    def arguments(self, text: str) -> None:
        """More of the last call's."""
        if text and self._listening:
            self._pieces.append(CallArguments(self._num_calls - 1, text))

    @property
    def num_calls(self) -> int:
        return self._num_calls

    @property
    def _listening(self) -> bool:
        return not self._one_call or self._num_calls == 1

    def turn(self) -> None:
        """Reasoning begins or ends here."""
        self.turns.append(self._passed + self._place)

    def pieces(self) -> list[Piece]:
        """What was found since the last call of this, neighbours of a kind as one."""
        if self._ended and self._blank and not self._num_calls:
            self._pieces.append(Content(self._blank))
            self._blank = ""
        pieces, self._pieces = self._pieces, []
        return merged(pieces)


def _safe(text: str, markers: tuple[str, ...]) -> int:
    """Where the first suffix of `text` begins that may be the beginning of a marker."""
    beginnings, longest = _beginnings(markers)
    for start in range(max(0, len(text) - longest), len(text)):
        if text[start:] in beginnings:
            return start
    return len(text)


@lru_cache(maxsize=64)
def _beginnings(markers: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """What markers may begin with, and the length of the longest."""
    found = frozenset(marker[:end] for marker in markers for end in range(1, len(marker)))
    return found, max(map(len, found), default=0)
