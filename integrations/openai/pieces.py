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
