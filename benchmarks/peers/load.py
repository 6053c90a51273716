"""Streamed completions from any OpenAI-compatible server, requests coming at a given rate."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_paged.benchmarks.engine.workload import Request

from ..latency import Answer

if TYPE_CHECKING:
    import httpx


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
        import httpx

        try:
            answer = httpx.get(f"{self.url}/models", headers=headers, timeout=30)
            return answer.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"{self.name}: {self.url}/models does not list a model: {error!r}") from error


async def load(
    peer: Peer, model: str, requests: Sequence[Request], due: Sequence[float], *, headers: dict, most: int | None = None,
    timeout: float = 600.0,
) -> list[Answer]:  # fmt: skip
    """All requests, in their order, each on a connection of its own and sent `due` so many seconds after the start.

    No more than `most` are under way at once (None: any number).
    """
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    places = nullcontext() if most is None else asyncio.Semaphore(most)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers) as client:
        start = time.perf_counter()

        async def one(request: Request, at: float) -> Answer:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            answer = Answer()
            async with places:
                try:
                    await _stream(client, peer, _body(model, request), answer)
                except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                    answer.problem = repr(error)
                answer.seconds = time.perf_counter() - start
            return answer

        return await asyncio.gather(*(one(request, at) for request, at in zip(requests, due, strict=True)))


def _body(model: str, request: Request) -> dict:
    """Greedy, to its full length (`ignore_eos` is vLLM's, llama.cpp's and hf_paged's), the prompt as token ids."""
    options = {"temperature": 0, "max_tokens": request.max_new_tokens, "ignore_eos": True}
    return {
        "model": model,
        "prompt": list(request.prompt),
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }


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
