"""Fair shares: the user who was served least goes first.

After the Virtual Token Counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024). A user's counter grows
by PROMPT_WEIGHT for every prompt token computed and by OUTPUT_WEIGHT for every token put out. The next to be admitted is
the first in line of the user with the lowest counter. Who had nothing waiting, and now has, is lifted to the lowest
counter of those who wait (if there are none: of who waited last): nobody saves service up. So of two users who both
have something waiting all the while, none is served more than the other by over

    2 max(PROMPT_WEIGHT * the longest prompt, OUTPUT_WEIGHT * the tokens that all running sequences can hold)

Prompt tokens from the prefix cache cost nothing, nor does computing again what a preempted sequence had. Running sequences
are in the same order, the user who was served most gives way first; newcomers push nobody out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import count
from operator import attrgetter

from .policy import Policy
from .request import Request, Sequence
from .waiting import Line, LineWalk

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
MAX_ABSENT = 4096  # users without a request whose counters are kept


def user_of(request: Request) -> str:
    """Requests that name nobody are one user's."""
    return request.user or ""


class FairShare(Policy):
    """Lines of waiting sequences by user, and the users' counters."""

    moves = True

    def __init__(self):
        self._lines: dict[str, Line] = {}
        self._size = 0
        self._served: dict[str, int] = {}
        self._open: Counter[str] = Counter()  # requests not ended yet
        self._heap: list[list] = []  # [counter as it was, number, user] of those with a line
        self._entries: dict[str, list] = {}  # the one that counts
        self._aside: list[list] = []  # taken out of the heap for one step
        self._numbers = count()
        self._floor = 0  # what a newcomer is lifted to; it never falls
        self._last = ""  # who waited last

    # -- requests

    def enter(self, request: Request) -> None:
        self._open[user_of(request)] += 1

    def leave(self, request: Request) -> None:
        user = user_of(request)
        self._open[user] -= 1
        if not self._open[user]:
            del self._open[user]
            self._forget()

    def order(self, request: Request, seq_id: int) -> tuple[int, int]:
        return self._counter(user_of(request)), seq_id

    def kind(self, request: Request) -> str:
        return user_of(request)

    # -- those that wait

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for line in self._lines.values() for seq in line)

    def wait(self, seq: Sequence) -> None:
        user = user_of(seq.request)
        if user not in self._lines:
            self._served[user] = max(self._counter(user), self._lowest())
            self._lines[user] = Line(kind=self.kind, key=attrgetter("seq_id"))
            self._push(user)
        self._lines[user].add(seq)
        self._size += 1

    def remove(self, seq: Sequence) -> None:
        user = user_of(seq.request)
        line = self._lines[user]
        line.remove(seq)
        self._size -= 1
        if not len(line):
            del self._lines[user], self._entries[user]
            self._last = user

    def walk(self) -> FairWalk:
        self._return()
        return FairWalk(self)

    # -- what was done for whom

    def computed(self, request: Request, num_prompt: int) -> None:
        self._charge(user_of(request), PROMPT_WEIGHT * num_prompt)

    def output(self, request: Request, num_tokens: int) -> None:
        self._charge(user_of(request), OUTPUT_WEIGHT * num_tokens)

    def stats(self) -> dict[str, int]:
        waiting = [self._counter(user) for user in self._lines]
        return {
            "users": len(self._open),
            "users_waiting": len(waiting),
            "service_gap": max(waiting) - min(waiting) if waiting else 0,
        }

    def check_integrity(self) -> None:
        for user, line in self._lines.items():
            line.check_integrity()
            assert len(line) and all(user_of(seq.request) == user for seq in line), "a line is empty, or somebody else's"
        assert self._size == sum(map(len, self._lines.values())), "the number of those that wait is off"
        listed = {id(entry) for entry in self._heap + self._aside}
        assert self._entries.keys() == self._lines.keys(), "a user with a line has no entry"
        assert all(id(entry) in listed for entry in self._entries.values()), "a user with a line would never be asked"

    # -- along the lines

    def lowest(self) -> str | None:
        """Who was served least of those that wait and are not set aside."""
        top = self._top()
        return None if top is None else top[2]

    def set_aside(self, user: str) -> None:
        """Until the next walk, ask for `user`, the lowest, no more."""
        entry = heapq.heappop(self._heap)
        assert entry is self._entries[user], "not the lowest"
        self._aside.append(entry)

    def line(self, user: str) -> Line:
        return self._lines[user]

    # -- private

    def _counter(self, user: str) -> int:
        return self._served.get(user, self._floor)

    def _charge(self, user: str, amount: int) -> None:
        self._served[user] = self._counter(user) + amount

    def _push(self, user: str) -> None:
        entry = self._entries[user] = [self._counter(user), next(self._numbers), user]
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._lines) + 64:  # most of them are no more
            self._heap = [one for one in self._heap if self._entries.get(one[2]) is one]
            heapq.heapify(self._heap)

    def _top(self) -> list | None:
        """The heap's first entry, made true: counters only grow, so what comes after it is no lower than it says."""
        while self._heap:
            entry = self._heap[0]
            counter, number, user = entry
            if self._entries.get(user) is not entry:
                heapq.heappop(self._heap)
            elif counter < self._counter(user):
                self._entries[user] = [self._counter(user), number, user]
                heapq.heapreplace(self._heap, self._entries[user])
            else:
                return entry
        return None

    def _return(self) -> None:
        for entry in self._aside:
            if self._entries.get(entry[2]) is entry:
                heapq.heappush(self._heap, entry)
        self._aside.clear()

    def _lowest(self) -> int:
        """The counter that newcomers are lifted to."""
        self._return()
        top = self._top()
        self._floor = max(self._floor, self._counter(self._last) if top is None else top[0])
        return self._floor

    def _forget(self) -> None:
        """Counters of the absent: those at the floor mean nothing, and of too many the lowest are dropped."""
        if len(self._served) <= len(self._open) + MAX_ABSENT:
            return
        absent = sorted((self._served[user], user) for user in self._served if not self._open[user])
        floor = self._lowest()
        for index, (counter, user) in enumerate(absent):
            if counter <= floor or index < len(absent) - MAX_ABSENT // 2:
                del self._served[user]


class FairWalk:
    """A step's way along the users' lines, always at the user who was served least."""

    def __init__(self, policy: FairShare):
        self._policy = policy
        self._walks: dict[Line, LineWalk] = {}

    def head(self) -> Sequence | None:
        while (user := self._policy.lowest()) is not None:
            seq = self._walk(user).head()
            if seq is not None:
                seq.order = self._policy.order(seq.request, seq.seq_id)
                return seq
            self._policy.set_aside(user)
        return None

    def pass_over(self, seq: Sequence) -> None:
        self._walk(user_of(seq.request)).pass_over(seq)

    def near(self, count: int) -> list[Sequence]:
        head = self.head()
        found = self._walk(user_of(head.request)).near(count)
        for seq in found:
            seq.order = self._policy.order(seq.request, seq.seq_id)
        return found

    def _walk(self, user: str) -> LineWalk:
        line = self._policy.line(user)
        walk = self._walks.get(line)
        if walk is None:
            walk = self._walks[line] = line.walk()
        return walk
