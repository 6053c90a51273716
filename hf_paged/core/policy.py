"""Who runs first: what a policy decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from .request import Request, Sequence


class Walk(Protocol):
    """One step's way along those that wait."""

    def head(self) -> Sequence | None:
        """Who is next, but for those that were passed over; its `order` is that of now."""
        ...

    def pass_over(self, seq: Sequence) -> None:
        """Ask for `seq` no more."""
        ...

    def near(self, count: int) -> list[Sequence]:
        """Those that may overtake the head, which there is: of its kind, and among the `count` next in line and next to
        come. So no more than `count` sequences of its kind overtake anybody.
        """
        ...


class Policy(ABC):
    """Gives every sequence its `order`: smaller runs first, larger gives way first. Keeps those that wait.

    Attributes:
        moves: whether the order of running sequences changes from step to step.
    """

    moves = False

    # -- requests

    def enter(self, request: Request) -> None:
        """A new request."""

    def leave(self, request: Request) -> None:
        """All its sequences have ended."""

    @abstractmethod
    def order(self, request: Request, seq_id: int) -> tuple[int, int]:
        """The order of one of its sequences, now."""

    def takes_from(self, newcomer: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence, which comes before a running one, takes its seat and its blocks."""
        return False

    def level(self, request: Request) -> float:
        """Prompts of lower levels are not to wait for those of higher ones."""
        return 0

    def kind(self, request: Request) -> object:
        """Only requests of equal kinds may overtake each other."""
        return None

    # -- those that wait

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Sequence]: ...

    @abstractmethod
    def wait(self, seq: Sequence) -> None: ...

    @abstractmethod
    def remove(self, seq: Sequence) -> None:
        """`seq` waits no more."""

    @abstractmethod
    def walk(self) -> Walk:
        """For one step, in which those that are removed were somebody's `head` or `near` it."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError unless those that wait are where they belong."""

    # -- what was done for whom, in tokens

    def computed(self, request: Request, num_prompt: int) -> None:
        """The prompt was taken up, with so many tokens that are not in the prefix cache."""

    def output(self, request: Request, num_tokens: int) -> None:
        """A sequence of it got so many tokens."""

    def stats(self) -> dict[str, int]:
        """What there is to tell of the policy's own."""
        return {}
