"""Requests that come over time, and what their answers' delays come to: one way of measuring for engines and servers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import schema

DELAYS = ("ttft", "gap", "total")
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
METRICS = {"output_tokens": "1/s", "served": "1/s"} | {f"{name}_{share}": "s" for name in DELAYS for share in SHARES}


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        times: seconds from when it came (was due, or was sent to a server) to each event that brought tokens.
        seconds: from the load's beginning until it ended.
        num_tokens: how many there were in all; of a server that does not count them, as many as events.
        problem: why it is no answer; None if it is one.
    """

    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    num_tokens: int | None = None
    problem: str | None = None


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests come: a Poisson process of so many a second; inf: all at once."""
    draw, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += 0.0 if math.isinf(rate) else draw.expovariate(rate)
    return times


class Feed:
    """Hands requests to a system of this process when they are due, and keeps the time of their tokens.

    Args:
        due: seconds after the start at which each request comes, in order.
        most: so many may be under way at once; further ones come when earlier ones end. None: any number.
    """

    def __init__(self, due: Sequence[float], most: int | None = None):
        self.due, self.most = list(due), most
        self.answers = [Answer() for _ in due]
        self._next, self._under_way = 0, 0
        self._came = list(due)
        self.begun = 0.0

    @classmethod
    def at_once(cls, count: int) -> Feed:
        return cls([0.0] * count)

    def start(self) -> None:
        assert not self._next, "a feed is used up by one run"
        self.begun = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def exhausted(self) -> bool:
        return self._next == len(self.due)

    @property
    def next_in(self) -> float:
        """Seconds until the next request comes; inf if none does before another one ends."""
        blocked = self.exhausted or (self.most is not None and self._under_way >= self.most)
        return math.inf if blocked else max(0.0, self.due[self._next] - self.now)

    def take(self, limit: int | None = None, *, wait: bool = True) -> list[int]:
        """Indices of requests that have come, at most `limit`. With `wait` it sleeps until there is one; then an empty
        list means that there are no more."""
        if wait and 0 < (pause := self.next_in) < math.inf:
            time.sleep(pause)
        taken: list[int] = []
        while self.next_in == 0 and (limit is None or len(taken) < limit):
            # With a bound on how many are under way a request comes when its place is free.
            self._came[self._next] = self.due[self._next] if self.most is None else self.now
            taken.append(self._next)
            self._next += 1
            self._under_way += 1
        return taken

    def token(self, index: int, at: float | None = None, count: int = 1) -> None:
        """`count` tokens came `at` so many seconds after the start, by default now."""
        answer, at = self.answers[index], self.now if at is None else at
        answer.times.append(at - self._came[index])
        answer.num_tokens = (answer.num_tokens or 0) + count

    def done(self, index: int) -> None:
        self.answers[index].seconds = self.now
        self._under_way -= 1


@dataclass(frozen=True)
class Outcome:
    """One system under one load.

    Attributes:
        values: by METRICS. The first token's time (ttft) and the last one's (total) are counted from when the request came; a
            gap is the time between two events of one answer, which may bring several tokens. `served` is requests a second.
        problems: of the requests that were not answered; nothing else counts them.
    """

    system: str
    rate: float
    values: dict[str, float]
    answered: int
    problems: list[str] = field(default_factory=list)


def outcome(system: str, rate: float, answers: Sequence[Answer]) -> Outcome:
    """Raises RuntimeError if no request was answered."""
    good = [answer for answer in answers if answer.problem is None and answer.times]
    problems = [answer.problem or "no text came" for answer in answers if answer not in good]
    if not good:
        raise RuntimeError(f"{system} answered no request: {problems[0]}")
    samples = {
        "ttft": [answer.times[0] for answer in good],
        "gap": [later - before for answer in good for before, later in zip(answer.times, answer.times[1:])] or [0.0],
        "total": [answer.times[-1] for answer in good],
    }
    seconds = max(answer.seconds for answer in good)
    values = {"output_tokens": sum(answer.num_tokens for answer in good) / seconds, "served": len(good) / seconds}
    values |= {f"{name}_{share}": schema.quantile(samples[name], at) for name in DELAYS for share, at in SHARES.items()}
    return Outcome(system, rate, values, len(good), problems)


def rate_name(rate: float) -> str:
    return "all at once" if math.isinf(rate) else f"{rate:.3g} a second"
