"""What clients do to a server, and what is noted of it."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .client import Answer, Client, Exchange
from .process import Reading, Server

SAMPLE_MEMORY = 0.25  # seconds


@dataclass(frozen=True)
class Question:
    """A request and the answer it must get."""

    text: str
    tokens: list[int]
    answer: str


@dataclass
class Load:
    """What many clients saw.

    Attributes:
        seconds: from the first request to the end of the last answer.
        answers: in the requests' order.
        lost: why answers that failed did; wrong: texts of questions that got other tokens than their own.
        before, after: the server's numbers.
        client_seconds: CPU time of the load generator.
        resident: bytes of the server's memory, every `SAMPLE_MEMORY` seconds; the first before the load, the last after.
    """

    seconds: float
    answers: list[Answer]
    lost: list[str]
    wrong: list[str]
    before: Reading
    after: Reading
    client_seconds: float
    resident: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def first_token(self) -> list[float]:
        return [answer.times[0] for answer in self.answers if answer.times]

    @property
    def between_tokens(self) -> list[float]:
        """Seconds from each event with tokens to the next one of the same answer."""
        return [later - one for answer in self.answers for one, later in zip(answer.times, answer.times[1:])]

    @property
    def tokens_per_event(self) -> float:
        """1 where every client got every token by itself."""
        return self.tokens / max(sum(len(answer.times) for answer in self.answers), 1)

    @property
    def lag(self) -> float:
        """Seconds: the event loop's, 99th percentile."""
        return self.after.lag_since(self.before, 0.99)

    @property
    def loop_per_token(self) -> float:
        """CPU seconds of the event loop's thread per streamed token."""
        return (self.after.loop_seconds - self.before.loop_seconds) / max(self.tokens, 1)

    @property
    def client_per_token(self) -> float:
        return self.client_seconds / max(self.tokens, 1)


def body(text: str, max_tokens: int, salt: str, **more) -> dict:
    """A streamed chat completion, greedy, that reports its tokens. `salt` keeps prefixes of earlier runs out."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": salt,
        **more,
    }


def run(server: Server, questions: Sequence[Question], max_tokens: int, salt: str, rate: float | None = None) -> Load:
    """Each question from a client of its own: all at once, or `rate` of them per second at random moments."""
    _allow_files(2 * len(questions))
    bodies = [body(question.text, max_tokens, salt) for question in questions]
    client = Client(server.port, "/v1/chat/completions")
    resident = [server.resident()]
    before, cpu = server.read(), time.process_time()
    exchanges = asyncio.run(_run(client, bodies, rate, server, resident))
    cpu, after = time.process_time() - cpu, server.read()
    resident.append(server.resident())
    answers = [client.read(exchange) for exchange in exchanges]
    begun = min(exchange.sent for exchange in exchanges)
    ended = max((exchange.pieces[-1][0] for exchange in exchanges if exchange.pieces), default=begun)
    lost = [answer.problem for answer in answers if answer.problem is not None]
    wrong = [
        question.text
        for question, answer in zip(questions, answers, strict=True)
        if answer.problem is None and (answer.token_ids, answer.text) != (question.tokens, question.answer)
    ]
    return Load(ended - begun, answers, lost, wrong, before, after, cpu, resident)


def _allow_files(count: int) -> None:
    """Every connection is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


async def _run(
    client: Client, bodies: list[dict], rate: float | None, server: Server, resident: list[int]
) -> list[Exchange]:
    memory = asyncio.create_task(_sample(server, resident))
    rng = random.Random(0)

    async def one(at: float, request: dict) -> Exchange:
        await asyncio.sleep(at)
        return await client.ask(request)

    moments, now = [], 0.0
    for _ in bodies:
        moments.append(now)
        now += 0.0 if rate is None else rng.expovariate(rate)
    try:
        return await asyncio.gather(*map(one, moments, bodies))
    finally:
        memory.cancel()


async def _sample(server: Server, resident: list[int]) -> None:
    while True:
        await asyncio.sleep(SAMPLE_MEMORY)
        resident.append(server.resident())


@dataclass(frozen=True)
class Newcomers:
    """Seconds to the first token of requests that came one by one.

    Attributes:
        idle: when nothing else ran.
        beside: while others streamed.
        long: one whose prompt is `long_text`, while others streamed.
        step: seconds between two tokens of the others, which any newcomer has to wait for.
        step_beside_long: those while the long prompt was computed.
        problems: requests that failed.
    """

    idle: list[float]
    beside: list[float]
    long: float
    step: list[float]
    step_beside_long: list[float]
    problems: list[str]


def newcomers(server: Server, questions: Sequence[Question], long_text: str, streams: int, salt: str) -> Newcomers:
    """The first `streams` questions are asked for endless answers, which are given up in the end; the others come to them."""
    return asyncio.run(_newcomers(server, questions, long_text, streams, salt))


async def _newcomers(
    server: Server, questions: Sequence[Question], long_text: str, streams: int, salt: str
) -> Newcomers:
    client = Client(server.port, "/v1/chat/completions")
    problems: list[str] = []

    async def first_token(text: str, turn: str) -> float:
        await asyncio.sleep(0.3)
        answer = client.read(await client.ask(body(text, 1, f"{salt}-{turn}")))
        if answer.problem is not None:
            problems.append(answer.problem)
        return answer.times[0] if answer.times else float("inf")

    crowd, visitors = questions[:streams], questions[streams:]
    idle = [await first_token(question.text, "idle") for question in visitors]
    endless = [body(question.text, 4096, salt, ignore_eos=True) for question in crowd]
    exchanges = [Exchange() for _ in endless]
    tasks = [asyncio.create_task(client.ask(request, exchange)) for request, exchange in zip(endless, exchanges)]
    while not all(len(exchange.pieces) > 1 for exchange in exchanges):
        await asyncio.sleep(0.05)
        problems += [str(task.result().problem or "a stream ended") for task in tasks if task.done()]
        if problems:
            break
    beside = [await first_token(question.text, "beside") for question in visitors]
    long_begins = time.perf_counter()
    long = await first_token(long_text, "long")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    step: list[float] = []
    step_beside_long: list[float] = []
    for exchange in exchanges:
        times = [at for at, _ in exchange.pieces][1:]  # the first one has the headers
        for one, later in zip(times, times[1:]):
            (step if later < long_begins else step_beside_long).append(later - one)
    return Newcomers(idle, beside, long, step, step_beside_long, problems)
