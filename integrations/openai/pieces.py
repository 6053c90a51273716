"""What an answer consists of, as it comes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The model calls a function.

    Attributes:
        index: of the call in the answer, from 0.
        id: what the function's result is given back under.
        name: of the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON text. A call's `CallBegins` came before, and no later call's."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer's last piece.

    Attributes:
        reason: "stop", "length", "tool_calls" or "abort".
        stop_reason: the stop token's id or the stop string that ended it; None for the rest.
    """

    reason: str
    stop_reason: int | str | None


Piece = Reasoning | Content | CallBegins | CallArguments | Finished


def merged(pieces: list[Piece]) -> list[Piece]:
    """The same, neighbours of a kind as one."""
    result: list[Piece] = []
    texts: list[str] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, CallBegins) or type(piece) is not type(last) or _index(piece) != _index(last):
            if texts:
                result[-1] = _with_text(last, "".join(texts))
            texts = []
            result.append(piece)
        if not isinstance(piece, CallBegins):
            texts.append(piece.text)
    if texts:
        result[-1] = _with_text(result[-1], "".join(texts))
    return result


def _index(piece) -> int | None:
    return piece.index if isinstance(piece, CallArguments) else None


def _with_text(piece, text: str):
    return CallArguments(piece.index, text) if isinstance(piece, CallArguments) else type(piece)(text)
