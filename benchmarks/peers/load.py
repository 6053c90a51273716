"""Streamed completions from any OpenAI-compatible server, requests coming at a given rate."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from hf_paged.benchmarks.engine.workload import Request


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        times: seconds from when it was sent to each event that brought text.
        seconds: from the load's beginning until it ended.
        num_tokens: as the server counts them; as many as there were events, if it does not.
        problem: why it is no answer; None if it is one.
    """

    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    num_tokens: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Peer:
    """A server: what it is called in tables, and the address of its API, which ends in /v1."""

    name: str
    url: str

    @classmethod
    def parse(cls, text: str) -> Peer:
        """From NAME=URL. Raises ValueError."""
        name, equals, url = text.partition("=")
        if not equals or not name or not url.startswith(("http://", "https://")):
            raise ValueError(f"a peer must be NAME=URL, with an address that begins with http, got {text!r}")
        return cls(name, url.rstrip("/"))

    def model(self, headers: dict) -> str:
        """The first model it lists. Raises ConnectionError if it does not answer."""
        try:
            answer = httpx.get(f"{self.url}/models", headers=headers, timeout=30)
            return answer.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"{self.name}: {self.url}/models does not list a model: {error!r}") from error


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests come: a Poisson process of so many a second; inf: all at once."""
    draw, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += 0.0 if math.isinf(rate) else draw.expovariate(rate)
    return times


async def load(
    peer: Peer, model: str, requests: Sequence[Request], rate: float, *, headers: dict, seed: int, timeout: float = 600.0
) -> list[Answer]:
    """All requests, in their order, each on a connection of its own and sent when it is due."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers) as client:
        start = time.perf_counter()

        async def one(request: Request, due: float) -> Answer:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            answer = Answer()
            try:
                await _stream(client, peer, _body(model, request), answer)
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                answer.problem = repr(error)
            answer.seconds = time.perf_counter() - start
            return answer

        due = arrivals(len(requests), rate, seed)
        return await asyncio.gather(*(one(request, at) for request, at in zip(requests, due)))


def _body(model: str, request: Request) -> dict:
    """Greedy, to its full length (`ignore_eos` is vLLM's, llama.cpp's and hf_paged's), the prompt as token ids."""
    options = {"temperature": 0, "max_tokens": request.max_new_tokens, "ignore_eos": True}
    return {"model": model, "prompt": list(request.prompt), "stream": True, "stream_options": {"include_usage": True}, **options}


async def _stream(client: httpx.AsyncClient, peer: Peer, body: dict, answer: Answer) -> None:
    sent = time.perf_counter()
    done = False
    async with client.stream("POST", f"{peer.url}/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            answer.problem = f"status {response.status_code}: {text[:200]}"
            return
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                done = True
                break
            chunk = json.loads(data)
            if "error" in chunk:
                answer.problem = f"error: {chunk['error']}"[:200]
                return
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                answer.times.append(time.perf_counter() - sent)
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]
    if not done:
        answer.problem = "the stream ended too early"
    elif answer.num_tokens is None:
        answer.num_tokens = len(answer.times)
