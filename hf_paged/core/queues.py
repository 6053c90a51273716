"""The waiting and the running sequences, and the seats that the running ones take."""

from __future__ import annotations

from bisect import insort
from itertools import pairwise

from .policy import Policy
from .request import Sequence, SequenceStatus
from .waiting import by_order, index_of


class Queues:
    """Who waits and who runs. Block tables are the caller's affair.

    Attributes:
        waiting: the policy, which keeps those that wait.
        running: sequences in the order they have had since `rerank`; read it, change it through the methods.
        seats_used: seats of all running sequences, those reserved for siblings to be forked included.
    """

    def __init__(self, policy: Policy):
        self.waiting = policy
        self.running: list[Sequence] = []
        self.seats_used = 0

    def rerank(self) -> None:
        """Bring the running sequences into the order that the policy has for them now."""
        if self.waiting.moves:
            for seq in self.running:
                seq.order = self.waiting.order(seq.request, seq.seq_id)
            self.running.sort(key=by_order)

    def wait(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.wait(seq)

    def seat(self, seq: Sequence) -> None:
        """From waiting to running."""
        self.waiting.remove(seq)
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=by_order)
        self.seats_used += seq.seats

    def seat_sibling(self, sibling: Sequence, leader: Sequence) -> None:
        """A fork of the running `leader` takes one of the seats reserved for it."""
        sibling.status = SequenceStatus.RUNNING
        insort(self.running, sibling, key=by_order)
        leader.pending_forks -= 1

    def send_back(self, seq: Sequence) -> None:
        """From running to waiting."""
        self.remove(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.wait(seq)

    def remove(self, seq: Sequence) -> None:
        """Out of the queue it is in."""
        if seq.status is SequenceStatus.RUNNING:
            del self.running[index_of(self.running, seq)]
            self.seats_used -= seq.seats
        else:
            self.waiting.remove(seq)

    def check_integrity(self, unfinished: list[Sequence]) -> None:
        """Raise AssertionError unless exactly `unfinished` are queued, in order, with the seats they take."""
        waiting = list(self.waiting)
        self.waiting.check_integrity()
        assert all(first.order < second.order for first, second in pairwise(self.running)), "a queue is out of order"
        for queue, status in ((waiting, SequenceStatus.WAITING), (self.running, SequenceStatus.RUNNING)):
            assert all(seq.status is status for seq in queue), "a sequence is in the wrong queue"
        queued = {id(seq) for seq in waiting + self.running}
        assert {id(seq) for seq in unfinished} == queued, "a queue lost a sequence, or kept one that ended"
        assert self.seats_used == sum(seq.seats for seq in self.running), "seats are off"
