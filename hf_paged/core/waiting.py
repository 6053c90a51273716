"""Lines of waiting sequences, and a step's way along one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

from .request import Request, Sequence


def by_order(seq: Sequence) -> tuple[int, int]:
    return seq.order


class Line:
    """Waiting sequences, first to run first.

    Args:
        kind: only requests of equal kinds may overtake each other.
        key: what they are sorted by; it does not change while they wait.
    """

    def __init__(self, *, kind: Callable[[Request], object], key: Callable[[Sequence], object] = by_order):
        self._sequences: list[Sequence] = []
        self._key, self._kind = key, kind

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, seq: Sequence) -> None:
        insort(self._sequences, seq, key=self._key)

    def remove(self, seq: Sequence) -> None:
        del self._sequences[index_of(self._sequences, seq, self._key)]

    def check_integrity(self) -> None:
        keys = [self._key(seq) for seq in self._sequences]
        assert all(first < second for first, second in pairwise(keys)), "a queue is out of order"

    def walk(self) -> LineWalk:
        """A way along the line as it is now; those removed meanwhile must be at its head or beyond."""
        return LineWalk(self._sequences, self._kind)


class LineWalk:
    """See `policy.Walk`."""

    def __init__(self, sequences: list[Sequence], kind: Callable[[Request], object]):
        self._sequences, self._kind = sequences, kind
        self._at = 0
        self._passed: set[int] = set()

    def head(self) -> Sequence | None:
        while self._at < len(self._sequences):
            seq = self._sequences[self._at]
            if seq.seq_id not in self._passed:
                return seq
            self._at += 1
        return None

    def pass_over(self, seq: Sequence) -> None:
        self._passed.add(seq.seq_id)

    def near(self, count: int) -> list[Sequence]:
        head, kind = self.head(), self._kind
        last, alike = head.seq_id + count, kind(head.request)
        return [
            seq
            for seq in islice(self._sequences, self._at + 1, self._at + 1 + count)
            if seq.seq_id <= last and seq.seq_id not in self._passed and kind(seq.request) == alike
        ]


def index_of(queue: list[Sequence], seq: Sequence, key: Callable[[Sequence], object] = by_order) -> int:
    """Where `seq` is in the sorted `queue`."""
    index = bisect_left(queue, key(seq), key=key)
    assert queue[index] is seq, f"{seq} is not in its queue"
    return index
