"""One HTTP request on its way from a front to a replica, and its answer on the way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

_TOLD = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client", "server")

PATIENCE = 10.0  # seconds that an app gets to notice that its client has gone


@dataclass(frozen=True)
class Call:
    """
    Attributes:
        scope: of ASGI, without what belongs to the process that it came to.
        body: of the request, whole.
        prefix: keys of what its prompt begins with, from `prefix.prefix_keys`; empty: any replica will do.
        replica: the one that holds what the request asks for, if it still runs; None: any.
    """

    scope: dict
    body: bytes
    prefix: tuple[bytes, ...] = ()
    replica: str | None = None


def plain(scope: Scope) -> dict:
    """What of an ASGI scope another process can make use of."""
    return {name: scope[name] for name in _TOLD if name in scope}


async def answers(app: ASGIApp, call: Call) -> AsyncIterator[list[Message]]:
    """What the app sends, all that is there at a time. Whoever stops reading is to the app a client that went away."""
    exchange = _Exchange(call)
    scope = call.scope | {"asgi": {"version": "3.0", "spec_version": "2.3"}, "state": {}}
    task = asyncio.create_task(app(scope, exchange.receive, exchange.send))
    task.add_done_callback(lambda _: exchange.news.set())
    try:
        while True:
            await exchange.news.wait()
            exchange.news.clear()
            if exchange.sent:
                sent, exchange.sent = exchange.sent, []
                yield sent
            elif task.done():
                task.result()
                return
    finally:
        exchange.gone.set()
        if not task.done():
            await asyncio.wait({task}, timeout=PATIENCE)
            task.cancel()


class _Exchange:
    def __init__(self, call: Call):
        self._body: bytes | None = call.body
        self.sent: list[Message] = []
        self.news = asyncio.Event()
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.gone.is_set():
            raise OSError("the client went away")
        self.sent.append(message)
        self.news.set()
