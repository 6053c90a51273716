"""The policies by name, each but "fair" one line of waiting sequences.

    fcfs       who came first
    priority   who came first, if a level of priority is worth AGING_SECONDS of waiting
    fair       whose user was served least
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..base.errors import InvalidArgument
from .fair import FairShare
from .policy import Policy
from .request import Request, Sequence
from .waiting import Line, LineWalk

AGING_SECONDS = 30
_SECOND = 1_000_000_000  # times are whole nanoseconds: exact, whatever number a priority is


class FirstCome(Policy):
    """First come, first served."""

    def __init__(self):
        self._line = Line(kind=self.kind)

    def order(self, request: Request, seq_id: int) -> tuple[int, int]:
        return 0, seq_id

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def wait(self, seq: Sequence) -> None:
        self._line.add(seq)

    def remove(self, seq: Sequence) -> None:
        self._line.remove(seq)

    def walk(self) -> LineWalk:
        return self._line.walk()

    def check_integrity(self) -> None:
        self._line.check_integrity()


class ByPriority(FirstCome):
    """Lower numbers first; every `AGING_SECONDS` that a request has waited longer than another make up for one level.

    All grow older alike, so their order among each other never changes, and nobody waits for ever. A newcomer takes seats
    and blocks only from a higher number than its own, and not if that has aged past it: equals would push each other out.

    Args:
        clock: nanoseconds.
    """

    def __init__(self, clock: Callable[[], int]):
        super().__init__()
        self._clock = clock

    def enter(self, request: Request) -> None:
        request.rank = self._clock() + request.priority * AGING_SECONDS * _SECOND

    def order(self, request: Request, seq_id: int) -> tuple[int, int]:
        return request.rank, seq_id

    def level(self, request: Request) -> int:
        return request.priority

    def kind(self, request: Request) -> int:
        return request.priority

    def takes_from(self, newcomer: Sequence, running: Sequence) -> bool:
        return running.request.priority > newcomer.request.priority and running.order > newcomer.order


def make_policy(name: str, clock: Callable[[], int]) -> Policy:
    """The policy of that name, whose clock gives nanoseconds."""
    makers = {"fcfs": FirstCome, "priority": lambda: ByPriority(clock), "fair": FairShare}
    if name not in makers:
        raise InvalidArgument(f"policy must be one of {', '.join(map(repr, makers))}, got {name!r}")
    return makers[name]()
