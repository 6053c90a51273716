"""The waiting and the running sequences, both in policy order, and the seats that the running ones take."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

from .request import Sequence, SequenceStatus


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.order


class Queues:
    """Who waits and who runs. Block tables are the caller's affair.

    Attributes:
        waiting, running: sequences in policy order; read them, change them through the methods.
        seats_used: seats of all running sequences, those reserved for siblings to be forked included.
    """

    def __init__(self):
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.seats_used = 0

    def wait(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        insort(self.waiting, seq, key=_rank)

    def seat(self, seq: Sequence) -> None:
        """From waiting to running."""
        del self.waiting[_index(self.waiting, seq)]
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=_rank)
        self.seats_used += seq.seats

    def seat_sibling(self, sibling: Sequence, leader: Sequence) -> None:
        """A fork of the running `leader` takes one of the seats reserved for it."""
        sibling.status = SequenceStatus.RUNNING
        insort(self.running, sibling, key=_rank)
        leader.pending_forks -= 1

    def send_back(self, seq: Sequence) -> None:
        """From running to waiting."""
        self.remove(seq)
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_rank)

    def remove(self, seq: Sequence) -> None:
        """Out of the queue it is in."""
        if seq.status is SequenceStatus.RUNNING:
            del self.running[_index(self.running, seq)]
            self.seats_used -= seq.seats
        else:
            del self.waiting[_index(self.waiting, seq)]

    def check_integrity(self, unfinished: list[Sequence]) -> None:
        """Raise AssertionError unless exactly `unfinished` are queued, in order, with the seats they take."""
        for queue, status in ((self.waiting, SequenceStatus.WAITING), (self.running, SequenceStatus.RUNNING)):
            assert all(first.order < second.order for first, second in pairwise(queue)), "a queue is out of order"
            assert all(seq.status is status for seq in queue), "a sequence is in the wrong queue"
        queued = {id(seq) for seq in self.waiting + self.running}
        assert {id(seq) for seq in unfinished} == queued, "a queue lost a sequence, or kept one that ended"
        assert self.seats_used == sum(seq.seats for seq in self.running), "seats are off"


def _index(queue: list[Sequence], seq: Sequence) -> int:
    index = bisect_left(queue, seq.order, key=_rank)
    assert queue[index] is seq, f"{seq} is not in its queue"
    return index
